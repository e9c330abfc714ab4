"""Queries whose labels may be incomplete: what has no label is not taught to be background."""

from __future__ import annotations

import pytest
import torch

from sam3lora.losses import Criterion, Predictions, Targets
from sam3lora.losses.masks import semantic_loss_sums
from sam3lora.losses.terms import iabce_term, sigmoid_focal, soft_dice, visible_queries

from .test_pure_functions import pairs_of, targets_of

LABELLED, LOOK_ALIKE, ELSEWHERE = range(3)
BOXES = torch.tensor([[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2], [0.25, 0.75, 0.2, 0.2]])


def gradients(exhaustive: list[bool] | None) -> list[dict[str, torch.Tensor]]:
    """For two queries, each with a labelled object and a look-alike without a label: of presence and of logits (Q,)."""
    logits = {name: torch.tensor([2.0, 2.0, -1.0]).repeat(1, 2, 1).requires_grad_() for name in ("o2o", "o2m")}
    boxes = BOXES.repeat(1, 2, 1, 1)
    presence = torch.zeros(1, 2, requires_grad=True)
    targets = Targets(
        num_B=torch.tensor([1, 1]),
        boxes_cxcywh_T4=BOXES[[LABELLED, LABELLED]],
        masks_THW=None,
        mask_valid_T=torch.zeros(2, dtype=torch.bool),
        exhaustive_B=None if exhaustive is None else torch.tensor(exhaustive),
    )
    predictions = Predictions(logits["o2o"], boxes, presence, logits["o2m"], boxes)
    Criterion()(predictions, targets).total.backward()
    return [
        {"presence": presence.grad[0, query]} | {name: leaf.grad[0, query] for name, leaf in logits.items()}
        for query in range(2)
    ]


@pytest.mark.parametrize("branch", ["o2o", "o2m"])
def test_a_look_alike_without_a_label_is_left_alone(branch):
    incomplete, complete = gradients([False, True])
    assert incomplete[branch][[LOOK_ALIKE, ELSEWHERE]].tolist() == [0, 0]
    # where all objects have a label, a look-alike is wrong and pushed down; the other prediction, less sure, by less
    assert complete[branch][LOOK_ALIKE] > complete[branch][ELSEWHERE] > 0
    # the labelled object is pulled up by the same amount in both, and so is presence
    assert incomplete[branch][LABELLED] == complete[branch][LABELLED] < 0
    assert incomplete["presence"] == complete["presence"] < 0


def test_all_exhaustive_is_the_default():
    for given, default in zip(gradients([True, True]), gradients(None), strict=True):
        assert all(torch.equal(given[name], default[name]) for name in default)


def test_gradients_are_those_of_the_weak_loss(pure):
    # Meta's code divides by the entries that are left, ours by all of them: the same gradient up to that factor.
    exhaustive = pure["iabce__is_exhaustive"]
    assert not exhaustive.all()
    logits = pure["iabce__logits"].clone().requires_grad_()
    targets, pairs = targets_of(pure), pairs_of(pure["iabce__indices"])
    num_queries, num_object_queries = logits.shape
    loss, matched = iabce_term(
        logits[None],
        pure["iabce__boxes_cxcywh"][None],
        targets.boxes_cxcywh_T4,
        pairs,
        visible_queries(targets.boxes_cxcywh_T4, targets.query_index(), num_queries),
        num_queries,
        pad_n_queries=None,
        pos_weight=10.0,
        exhaustive_B=exhaustive,
    )
    loss.sum().backward()
    num_left = int((matched[0] | exhaustive[:, None]).sum())
    assert num_left < num_queries * num_object_queries
    share = num_left / (num_queries * num_object_queries)
    torch.testing.assert_close(loss[0], pure["iabce__exp_loss_ce__weak"] * share, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, pure["iabce__exp_grad_logits__weak"] * share, rtol=1e-4, atol=1e-9)


def test_pixels_without_a_label_stay_out_of_the_semantic_term():
    # Two queries of 2 x 2 pixels with one labelled pixel each; of the second, the others may be unlabelled objects.
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).repeat(2, 1, 1).requires_grad_()
    masks = torch.zeros(2, 2, 2, dtype=torch.bool)
    masks[:, 0, 0] = True
    focal, dice = semantic_loss_sums(logits, lambda start, end: masks[start:end], 1, torch.tensor([True, False]))
    (focal + dice).backward()
    complete, incomplete = logits.grad
    assert incomplete.flatten()[1:].tolist() == [0, 0, 0]
    assert (complete.flatten()[1:] > 0).all()
    assert incomplete[0, 0] < 0
    # by hand: the labelled pixel alone, its focal loss divided by the same four pixels
    rows, wanted, p = logits.detach().flatten(1), masks.flatten(1), torch.tensor(1.0).sigmoid()
    first = sigmoid_focal(rows[:1], wanted[:1], 0.6, 2).mean() + soft_dice(rows[:1], wanted[:1])[0]
    second = -0.6 * (1 - p) ** 2 * p.log() / 4 + 1 - (2 * p + 1) / (p + 2)
    torch.testing.assert_close((focal + dice).detach(), first + second)


def test_unlabelled_pixels_of_an_incomplete_query_are_not_background():
    # Two queries with the same semantic logits and mask, of which only the second has all of its labels.
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    semantic = torch.full((2, 4, 4), 0.5, requires_grad=True)
    predictions = Predictions(
        torch.zeros(1, 2, 3),
        BOXES.repeat(1, 2, 1, 1),
        torch.zeros(1, 2),
        mask_logits=lambda branch, query, object_query: torch.zeros(len(query), 4, 4),
        semantic_logits=lambda queries: semantic[queries],
    )
    targets = Targets(
        torch.tensor([1, 1]), BOXES[[0, 0]], mask, torch.ones(2, dtype=torch.bool), torch.tensor([False, True])
    )
    Criterion()(predictions, targets).total.backward()
    incomplete, complete = semantic.grad
    assert (incomplete[~mask[0]] == 0).all()
    assert (complete[~mask[1]] > 0).all()
    assert (incomplete[mask[0]] < 0).all()
