"""The paired bootstrap: what it draws, what it reports, and that it covers what it says."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.evaluation.metrics.bootstrap import Interval, bootstrap_difference, map_difference

from .splits import map_of, rle


def mean_of(values):
    """A metric: the weighted mean of one value per image."""
    return lambda image_weights_I: float(np.average(values, weights=image_weights_I))


def evaluate(num_images: int, num_right: int, *, objects_from: int = 0):
    """One object per image, found in the first `num_right` of them."""
    objects = [(i, 0, rle(5, 5), 0) for i in range(objects_from, num_images)]
    return map_of(objects, [(i, 0, rle(5, 5), 0.9) for i in range(num_right)], num_images).table


def test_nothing_to_draw_from():
    # no image; an average that nobody can compute; one image, where all draws are the same
    assert bootstrap_difference(lambda _: None, lambda _: None, 0) == Interval(None, None, None, False, 0)
    assert bootstrap_difference(lambda _: None, mean_of([1, 2]), 2) == Interval(None, None, None, False, 0)
    assert bootstrap_difference(mean_of([1]), mean_of([3]), 1) == Interval(2, None, None, False, 0)


def test_difference_is_b_minus_a():
    values = np.arange(20.0)
    found = bootstrap_difference(mean_of(values), mean_of(values + 3), 20)
    # paired: every draw moves both models alike, and nothing is left to vary
    assert (found.difference, found.low, found.high) == (pytest.approx(3), pytest.approx(3), pytest.approx(3))
    assert found.excludes_zero
    worse = bootstrap_difference(mean_of(values + 3), mean_of(values), 20)
    assert worse.high == pytest.approx(-3)
    assert worse.excludes_zero
    # two images are enough: a quarter of the draws is of the first only, a quarter of the second
    two = bootstrap_difference(mean_of([0, 0]), mean_of([1, 2]), 2)
    assert (two.low, two.high) == (1, 2)


def test_no_difference_includes_zero():
    values = np.random.default_rng(0).normal(size=50)
    found = bootstrap_difference(mean_of(values), mean_of(-values[::-1] + 2 * values.mean()), 50)
    assert found.low < found.difference < found.high
    assert not found.excludes_zero


def test_every_draw_has_as_many_images():
    seen = []
    bootstrap_difference(lambda w: seen.append(w) or 0.0, mean_of(np.ones(7)), 7, num_resamples=50)
    assert seen[0].tolist() == [1] * 7
    assert all(w.sum() == 7 and w.min() >= 0 for w in seen)
    assert len({tuple(w) for w in seen}) > 30


def test_the_seed_decides():
    a, b = np.random.default_rng(1).normal(size=(2, 30))
    first, again, other = (bootstrap_difference(mean_of(a), mean_of(b), 30, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first.low != other.low


def test_width_is_that_of_a_mean():
    # normal theory: difference +- z standard errors; the bootstrap's own noise is a few percent
    a, b = np.random.default_rng(2).normal(size=(2, 400))
    error = (b - a).std() / 20
    for confidence, z in ((0.95, 1.96), (0.8, 1.28)):
        found = bootstrap_difference(mean_of(a), mean_of(b), 400, confidence=confidence)
        np.testing.assert_allclose(
            [found.low, found.high], (b - a).mean() + np.array([-z, z]) * error, atol=0.2 * error
        )


def test_draws_that_cannot_be_measured_are_left_out():
    # only image 0 has something to find: 1 - (9 / 10)^10 = 65 % of the draws hold it
    def metric(image_weights_I):
        return 1.0 if image_weights_I[0] else None

    found = bootstrap_difference(mean_of(np.zeros(10)), metric, 10)
    assert (found.low, found.high) == (1, 1)
    assert 600 < found.num_resamples < 700


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 95}, {"num_resamples": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .* got {next(iter(wrong.values()))}"):
        bootstrap_difference(mean_of([1]), mean_of([1]), 1, **wrong)


def test_map_difference():
    half, most = evaluate(40, 20), evaluate(40, 36)
    found = map_difference(half, most, num_resamples=300)
    # no wrong detections: AP is the share of recalls 0, 0.01 ... 1 that is reached, (91 - 51) / 101
    assert found.difference == pytest.approx(40 / 101)
    assert 0.2 < found.low < found.difference < found.high < 0.6
    assert found.excludes_zero
    same = map_difference(half, half, num_resamples=50)
    assert (same.difference, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    for other in (evaluate(41, 20), evaluate(40, 20, objects_from=1)):
        with pytest.raises(ValueError, match="one ground truth"):
            map_difference(half, other)
