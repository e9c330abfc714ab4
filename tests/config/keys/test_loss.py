"""Keys of `training.loss`."""

from __future__ import annotations

import pytest
import torch

from sam3lora.losses import masks
from sam3lora.training.step import StepCounts

from .conftest import acts, first_batch, loss_terms

TERMS_OF_WEIGHT = {
    "bbox": ("loss_bbox",),
    "giou": ("loss_giou",),
    "ce": ("loss_ce",),
    "presence": ("presence_loss",),
    "mask": ("loss_mask",),
    "dice": ("loss_dice",),
    "semantic": ("loss_semantic_seg",),
    "semantic_dice": ("loss_semantic_dice",),
}
O2M_WEIGHTS = {"bbox": 5.0, "giou": 2.0, "ce": 20.0, "mask": 200.0, "dice": 10.0}


def total_and_terms(worker) -> tuple[float, dict[str, float], float]:
    """What the gradient is taken of, the unweighted terms, and the scale that the recipe gives the sum."""
    batch = first_batch(worker)
    normalizer = StepCounts.of([batch]).normalizer()
    worker.model.eval()
    total, terms = worker.runner.backward(batch, normalizer)
    return total.item(), {name: value.item() for name, value in terms.items()}, normalizer.scale


@acts(*(f"training.loss.{name}" for name in TERMS_OF_WEIGHT))
@pytest.mark.parametrize("name", TERMS_OF_WEIGHT)
def test_weight_multiplies_its_term(name, build, shared):
    worker = shared()
    default = getattr(worker.config.training.loss, name)
    total, terms, scale = total_and_terms(worker)
    more, _, _ = total_and_terms(build(f"training.loss.{name}={default + 3}"))
    # In both branches; the one-to-many branch counts twice.
    share = sum(terms[term] + 2 * terms.get(f"{term}_o2m", 0.0) for term in TERMS_OF_WEIGHT[name])
    assert share > 0
    assert more - total == pytest.approx(3 * scale * share, rel=1e-3)


@acts("training.loss.o2m")
def test_o2m_multiplies_the_terms_of_its_branch(build, shared):
    total, terms, scale = total_and_terms(shared())
    more, _, _ = total_and_terms(build("training.loss.o2m=3"))
    share = sum(weight * terms[f"loss_{name}_o2m"] for name, weight in O2M_WEIGHTS.items())
    assert share > 0
    assert more - total == pytest.approx(scale * share, rel=1e-3)


@acts("training.loss.pos_weight")
def test_pos_weight_changes_the_classification_term_alone(build, shared):
    usual, heavy = loss_terms(shared()), loss_terms(build("training.loss.pos_weight=20"))
    changed = {name for name in usual if heavy[name] != pytest.approx(usual[name], rel=1e-6)}
    assert changed == {"loss_ce", "loss_ce_o2m"}
    assert heavy["loss_ce"] > usual["loss_ce"]


@acts("training.loss.mask_resolution")
def test_mask_resolution_is_where_masks_are_compared(shared, monkeypatch):
    compared = []

    def watch(name, compares):
        sums = getattr(masks, name)
        monkeypatch.setattr(
            masks, name, lambda *arguments: compared.append(tuple(arguments[compares].shape[1:])) or sums(*arguments)
        )

    watch("focal_and_dice", 1)  # of all pixels of the masks
    watch("_focal_and_dice", 0)  # of points

    def shapes(*overrides):
        compared.clear()
        loss_terms(shared(*overrides))
        return set(compared)

    assert shapes() == {(112, 112)}
    assert shapes("training.loss.mask_resolution=low") == {(32, 32)}
    # Points are for instance masks; the semantic mask is compared whole.
    assert (12544,) in shapes("training.loss.mask_resolution=points")


@acts("training.loss.num_points")
def test_num_points_are_sampled(build, monkeypatch):
    sampled = []
    choose = masks.choose_points
    monkeypatch.setattr(masks, "choose_points", lambda *args: sampled.append(choose(*args)) or sampled[-1])
    torch.manual_seed(0)
    loss_terms(build("training.loss.mask_resolution=points", "training.loss.num_points=40"))
    assert {points.shape[1] for points in sampled} == {40}
