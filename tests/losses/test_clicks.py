"""The loss of the click head: each term by hand on masks of 4 x 4, which mask learns, and what adds up."""

from __future__ import annotations

import math

import pytest
import torch

from sam3lora.losses.clicks import CLICK_WEIGHTS, ClickCriterion, mask_iou

CERTAIN = 30.0
TRUTH = torch.zeros(1, 4, 4, dtype=torch.bool)
TRUTH[0, :2] = True  # the upper 8 of 16 pixels


def logits_of(*masks: torch.Tensor, certain: float = CERTAIN) -> torch.Tensor:
    """(1, M, 4, 4) from bool masks (4, 4)."""
    return torch.stack([torch.where(mask, certain, -certain) for mask in masks])[None]


def rows(*numbers: int) -> torch.Tensor:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[list(numbers)] = True
    return mask


def loss(
    logits, expected_iou, object_logits=(CERTAIN,), truth=TRUTH, num_objects=None, weights=CLICK_WEIGHTS, **options
):
    num_objects = len(truth) if num_objects is None else num_objects
    expected = torch.as_tensor(expected_iou)
    return ClickCriterion(weights)(logits, expected, torch.as_tensor(object_logits), truth, num_objects, **options)


def test_a_right_answer_costs_nothing():
    found = loss(logits_of(rows(0, 1)), [[1.0]])
    assert found.total.item() == pytest.approx(0, abs=1e-6)
    assert found.iou_NM.tolist() == [[1.0]]


def test_focal_by_hand():
    # All logits 0: p = 1/2, so that a pixel costs weight x 1/4 x ln 2; 4 pixels weigh 1/4, the other 12 weigh 3/4.
    found = loss(torch.zeros(1, 1, 4, 4), [[0.0]], truth=rows(0)[None])
    assert found.terms["click_focal"].item() == pytest.approx((4 * 0.25 + 12 * 0.75) / 16 / 4 * math.log(2))


def test_dice_by_hand():
    # Three rows found, two of them right: 1 - (2 x 8 + 1) / (12 + 8 + 1).
    found = loss(logits_of(rows(0, 1, 2)), [[0.0]])
    assert found.terms["click_dice"].item() == pytest.approx(1 - 17 / 21)


def test_iou_term_is_the_mean_over_all_masks():
    # Right rows of three masks: all 8 of 8; 8 of 12; 4 of 12.
    logits = logits_of(rows(0, 1), rows(0, 1, 2), rows(1, 2))
    found = loss(logits, [[0.75, 2 / 3, 1.0]])
    torch.testing.assert_close(found.iou_NM, torch.tensor([[1, 2 / 3, 1 / 3]]))
    assert found.terms["click_iou"].item() == pytest.approx((0.25 + 0 + 2 / 3) / 3)
    assert found.cheapest_N.tolist() == [0]


def test_object_score_by_hand():
    found = loss(logits_of(rows(0, 1)), [[1.0]], [0.0])
    assert found.terms["click_object"].item() == pytest.approx(math.log(2))


def test_total_weighs_the_terms():
    found = loss(torch.zeros(1, 1, 4, 4), [[0.5]], [0.0])
    dice = 1 - (2 * 4 + 1) / (8 + 8 + 1)
    # no pixel lies above the cut at 0, so the real IoU is 0
    assert found.total.item() == pytest.approx(20 * math.log(2) / 8 + dice + 0.5 + math.log(2))
    heavier = CLICK_WEIGHTS | {"click_iou": 3.0, "click_focal": 0.0}
    assert loss(torch.zeros(1, 1, 4, 4), [[0.5]], [0.0], weights=heavier).total.item() == pytest.approx(
        dice + 1.5 + math.log(2)
    )


def test_only_the_cheapest_mask_learns_its_pixels():
    logits = logits_of(rows(2, 3), rows(0, 1, 2), rows(0, 2), certain=1.0).requires_grad_()
    expected = torch.full((1, 3), 0.5, requires_grad=True)
    found = loss(logits, expected)
    assert found.cheapest_N.tolist() == [1]
    found.total.backward()
    assert logits.grad[0, 1].abs().min() > 0
    assert logits.grad[0, [0, 2]].abs().max() == 0
    # while the expected IoU of all masks learns: down for those below it, up for the one above
    assert torch.equal(expected.grad.sign(), torch.tensor([[1.0, -1.0, 1.0]]))


def test_the_weights_decide_which_mask_is_the_cheapest():
    # One mask is a little wrong everywhere, the other certainly wrong in one row: dice prefers the second.
    unsure = torch.where(TRUTH[0], 0.1, -0.1)
    logits = torch.stack([unsure, torch.where(rows(0, 1, 2), 8.0, -8.0)])[None]
    assert loss(logits, [[0.0, 0.0]]).cheapest_N.tolist() == [0]
    dice_only = CLICK_WEIGHTS | {"click_focal": 0.0}
    assert loss(logits, [[0.0, 0.0]], weights=dice_only).cheapest_N.tolist() == [1]


def test_an_empty_object_teaches_only_that_it_is_not_there():
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    expected = torch.full((1, 3), 0.5, requires_grad=True)
    object_logits = torch.zeros(1, requires_grad=True)
    found = loss(logits, expected, object_logits, empty)
    assert {name: round(value.item(), 6) for name, value in found.terms.items()} == {
        "click_focal": 0,
        "click_dice": 0,
        "click_iou": 0,
        "click_object": round(math.log(2), 6),
    }
    found.total.backward()
    assert logits.grad.abs().max() == 0
    assert expected.grad.abs().max() == 0
    assert object_logits.grad.item() == pytest.approx(0.5)  # down


def test_prompts_batches_and_workers_add_up():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(5, 8, 8, generator=generator) > 0.6
    truth[3] = False
    logits, expected = torch.randn(5, 3, 8, 8, generator=generator), torch.rand(5, 3, generator=generator)
    scores = torch.randn(5, generator=generator)
    whole = loss(logits, expected, scores, truth)
    parts = [slice(0, 2), slice(2, 5)]
    of_parts = [loss(logits[p], expected[p], scores[p], truth[p], num_objects=5) for p in parts]
    torch.testing.assert_close(whole.total, of_parts[0].total + of_parts[1].total)
    for name in CLICK_WEIGHTS:
        torch.testing.assert_close(whole.terms[name], of_parts[0].terms[name] + of_parts[1].terms[name])
    # the mean over two workers of one part each is the whole
    workers = [loss(logits[p], expected[p], scores[p], truth[p], num_objects=5, world_size=2).total for p in parts]
    torch.testing.assert_close(whole.total, sum(workers) / 2)
    # as many objects twice cost the same for each
    twice = loss(logits.repeat(2, 1, 1, 1), expected.repeat(2, 1), scores.repeat(2), truth.repeat(2, 1, 1))
    torch.testing.assert_close(twice.total, whole.total)


def test_masks_of_another_size_are_compared_at_that_of_the_truth():
    # 2 x 2 logits of a truth of 4 x 4: the sign of the resized ones is that of the halves
    logits = torch.tensor([[[[5.0, 5.0], [-5.0, -5.0]]]], requires_grad=True)
    found = loss(logits, [[1.0]])
    assert found.iou_NM.item() == 1
    found.total.backward()
    assert logits.grad.shape == (1, 1, 2, 2)


def test_half_precision_is_computed_in_float32():
    logits = logits_of(rows(0, 1, 2)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, torch.tensor([[0.5]]).bfloat16())
    assert found.total.dtype == torch.float32
    found.total.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_no_object():
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    found = loss(logits, torch.zeros(0, 3), torch.zeros(0), TRUTH[:0])
    assert found.total.item() == 0
    found.total.backward()
    assert logits.grad.shape == logits.shape


def test_iou_of_empty_masks():
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert mask_iou(empty, empty).item() == 1
    assert mask_iou(empty, TRUTH).item() == 0
    assert mask_iou(TRUTH, empty).item() == 0
