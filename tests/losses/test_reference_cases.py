"""The criterion against complete loss cases: every term, total, match, gradient and diagnostic."""

import pytest
import torch

from sam3lora.losses import LossSection

CASES = ["mixed", "all_negative", "crowded_invalid_mask", "single_positive", "q200"]
TERMS = [
    "loss_bbox",
    "loss_giou",
    "loss_ce",
    "presence_loss",
    "loss_bbox_o2m",
    "loss_giou_o2m",
    "loss_ce_o2m",
    "loss_mask",
    "loss_dice",
    "loss_mask_o2m",
    "loss_dice_o2m",
    "loss_semantic_seg",
    "loss_semantic_dice",
]


@pytest.mark.parametrize("padding", ["pad200", "padnone"])
@pytest.mark.parametrize("name", CASES)
def test_segmentation_recipe(name, padding, load_case, compute, assert_matches_reference):
    # Every expected array of the file is compared, none is skipped: the names left over are the other recipe's totals.
    case = load_case(name)
    results = compute(case, padding)
    for key, value in results.items():
        assert_matches_reference(key, value, case.expected[key])
    other = "padnone" if padding == "pad200" else "pad200"
    expected = {key for key in case.expected if key.startswith("exp_") and not key.endswith(f"__{other}")}
    assert expected - set(results) == {f"exp_core_loss_det__{padding}", "exp_num_boxes_norm"}


@pytest.mark.parametrize("padding", ["pad200", "padnone"])
@pytest.mark.parametrize("name", CASES)
def test_detection_recipe(name, padding, load_case, compute, assert_matches_reference):
    # Without mask callables the total is the detection one, and box, class and presence gradients stay the same.
    case = load_case(name)
    results = compute(case, padding, masks=False)
    assert f"exp_core_loss_det__{padding}" in results
    for key, value in results.items():
        assert_matches_reference(key, value, case.expected[key])
    assert not any(key.startswith("exp_grad_masks") for key in results)


@pytest.mark.parametrize("term", TERMS)
def test_comparison_rejects_a_term_off_by_a_thousandth(term, load_case, compute, assert_matches_reference):
    # The comparison above would notice each term, were it wrong by 0.1 %.
    case = load_case("mixed")
    results = compute(case, "pad200")
    key = next(key for key in results if key.removesuffix("__pad200") == f"exp_{term}")
    assert_matches_reference(key, results[key], case.expected[key])
    with pytest.raises(AssertionError):
        assert_matches_reference(key, results[key] * 1.001, case.expected[key])


@pytest.mark.parametrize(
    "weight", ["bbox", "giou", "ce", "presence", "mask", "dice", "semantic", "semantic_dice", "o2m"]
)
def test_comparison_rejects_a_weight_off_by_a_thousandth(weight, load_case, compute, assert_matches_reference):
    # Gradients and totals depend on every weight: a wrong one fails at least one of their comparisons.
    case = load_case("mixed")
    results = compute(case, "pad200", settings=LossSection(**{weight: getattr(LossSection(), weight) * 1.001}))
    failed = []
    for key in [key for key in results if "grad" in key or "core_loss" in key]:
        try:
            assert_matches_reference(key, results[key], case.expected[key])
        except AssertionError:
            failed.append(key)
    assert any("grad" in key for key in failed)


def test_all_negative_reaches_every_prediction(load_case, compute):
    # No match at all: every input still gets a gradient, and all but presence are exactly zero.
    case = load_case("all_negative")
    compute(case, "pad200")
    for name, leaf in case.leaves.items():
        assert leaf.grad is not None, name
        assert (leaf.grad.abs().max() > 0) == (name == "presence_logits"), name


def test_case_values_are_not_trivial(load_case):
    # Guards the comparison itself: the positive cases have non-zero expected terms and gradients.
    expected = load_case("mixed").expected
    for key, value in expected.items():
        if key.startswith("exp_") and torch.is_floating_point(value):
            assert value.abs().max() > 0, key
