"""Differences to the base and their intervals."""

from __future__ import annotations

import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.evaluation.metrics.comparison import differences_to_base
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.split_results import SplitResults

from .splits import result, write_split

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A crack in the even images."""
    objects = [(image, 1, 10) for image in range(0, NUM_IMAGES, 2)]
    index = CocoIndex.from_folder(write_split(tmp_path_factory.mktemp("s") / "s", objects, {1: "crack"}, NUM_IMAGES))
    return SplitTruth(index, prompted_categories(index))


def measured(truth, label, predictions):
    return measure_split(truth, SplitResults(predictions), label=label)


def test_equal_models_do_not_differ(truth):
    same = [result(image, 1, 10, 0.9) for image in range(0, NUM_IMAGES, 2)]
    of_adapter = differences_to_base(measured(truth, "base", same), [measured(truth, "a", same)], num_resamples=50)
    for interval in of_adapter["a"].values():
        assert (interval.difference, interval.low, interval.high, interval.excludes_zero) == (0, 0, 0, False)


def test_a_model_that_is_always_better_excludes_zero(truth):
    right = [result(image, 1, 10, 0.9) for image in range(0, NUM_IMAGES, 2)]
    alarms = [result(image, 1, 10, 0.9) for image in range(1, NUM_IMAGES, 2)]
    differences = differences_to_base(
        measured(truth, "base", alarms),
        [measured(truth, "good", right), measured(truth, "bad", alarms)],
        num_resamples=200,
    )
    of_good = differences["good"]
    assert of_good["map"].difference == pytest.approx(1)
    assert of_good["off_prompt_fpr"].difference == -1
    # right about presence in every image, where the base is wrong in every one; boxes found: F1 0 against 1
    assert of_good["cgf1"].difference == pytest.approx(1, abs=1e-3)
    assert all(interval.excludes_zero for interval in of_good.values())
    assert not any(interval.excludes_zero for interval in differences["bad"].values())


def test_the_difference_of_the_split_is_that_of_its_metrics(truth):
    base = measured(truth, "base", [result(0, 1, 10, 0.9), result(1, 1, 10, 0.8)])
    adapter = measured(truth, "a", [result(image, 1, 10, 0.6) for image in range(0, 8)])
    for name, interval in differences_to_base(base, [adapter], num_resamples=10)["a"].items():
        assert interval.difference == pytest.approx(getattr(adapter, name) - getattr(base, name), abs=1e-9)
