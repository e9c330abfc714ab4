"""The criterion against complete loss cases: every term, total, match, gradient and diagnostic."""

import pytest
import torch

CASES = ["mixed", "all_negative", "crowded_invalid_mask", "single_positive", "q200"]


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
