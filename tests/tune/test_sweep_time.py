"""The estimated time of a sweep, by hand, and the share of the epochs that early stopping leaves."""

from __future__ import annotations

import dataclasses

import pytest

from sam3lora.config import Config, load_config
from sam3lora.tune.estimate.probe import ImageCost, Probe
from sam3lora.tune.estimate.sweep_time import (
    RAY_START_S,
    cache_filling_seconds,
    duration,
    expected_share,
    sweep_time,
    trial_seconds,
)

# An image takes 1 s in training and 0.5 s in validation, twice that when it is first seen; 10 s to start.
PROBE = Probe(
    device="the CPU",
    num_train=10,
    num_valid=4,
    start_s=10.0,
    train=ImageCost(0.4, 0.6),
    valid=ImageCost(0.25, 0.25),
    first_train=ImageCost(0.8, 1.2),
    first_valid=ImageCost(0.5, 0.5),
    metrics_s=0.5,
    num_measured=3,
    memory_mb=1000.0,
    cache_bytes=1e6,
    uses_features=True,
)


def make_config(*overrides: str) -> Config:
    """Four epochs of five steps."""
    short = ["training.num_epochs=4", "training.batch_size=2", "training.images_per_step=2"]
    return load_config("demo", [*short, "scaling.num_workers=0", *overrides])


def test_shares_by_hand():
    assert expected_share(1, 9, (1, 3), 3) == 1
    assert expected_share(12, 9, (), 3) == 1
    # The second of two trials is the better one half of the time: (9 + (9 + 1) / 2) / 18.
    assert expected_share(2, 9, (1, 3), 3) == pytest.approx(14 / 18, abs=0.03)
    # Of three, factor 2: the third goes on if it beats the median of two, by 1/4 + 1/3 = 1/2 for uniform values.
    assert expected_share(3, 10, (1,), 2) == pytest.approx((10 + 5.5 + 5.5) / 30, abs=0.03)


def test_share_of_a_long_sweep_approaches_that_of_successive_halving():
    # 2/3 stop after epoch 1, 2/9 after 3, 2/27 after 9, the rest train to 27.
    limit = (2 / 3 * 1 + 2 / 9 * 3 + 2 / 27 * 9 + 1 / 27 * 27) / 27
    shares = [expected_share(count, 27, (1, 3, 9), 3) for count in (1, 4, 16, 64, 256)]
    assert shares == sorted(shares, reverse=True)
    assert limit < shares[-1] < 1.3 * limit


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [
        ([], 10 + 4 * (10 + 2)),
        (["training.max_steps=3"], 10 + 0.6 * 10 + 2),  # less than an epoch, and validated once
        (["training.max_steps=100"], 10 + 4 * (10 + 2)),
        (["evaluation.every_epochs=2"], 10 + 4 * (10 + 2) + 2 * 1.5),
        # Two workers share the images; each has a CPU that decodes ahead: 0.6 s and 0.25 s an image.
        (["scaling.num_workers=2"], 10 + RAY_START_S + 4 * (6 + 1) / 2),
    ],
)
def test_seconds_of_a_trial(overrides, seconds):
    assert trial_seconds(make_config(*overrides), PROBE) == pytest.approx(seconds)


def test_early_stopping_shortens_no_start_and_uncached_images_fill_no_cache():
    assert trial_seconds(make_config(), PROBE, share=0.5) == pytest.approx(10 + 24)
    uncached = dataclasses.replace(PROBE, cache_bytes=0)  # then the first steps merely warmed up
    found = [cache_filling_seconds(make_config(), probe) for probe in (PROBE, uncached)]
    assert found == pytest.approx([10 + 2, 0])


def test_time_of_a_sweep():
    small, large = make_config(), make_config("evaluation.every_epochs=2")
    found = sweep_time([(small, PROBE), (large, PROBE)], num_trials=5, at_a_time=2, rungs=[], reduction_factor=3)
    assert found.trial_s == pytest.approx((58, 61))
    assert found.share == 1
    assert found.at_most_s == pytest.approx(12 + 3 * 61)  # 2 + 2 + 1 trials
    assert found.about_s == pytest.approx(12 + 5 / 2 * 59.5)
    stopped = sweep_time([(small, PROBE)], num_trials=5, at_a_time=2, rungs=[1], reduction_factor=3)
    assert stopped.share == expected_share(5, 4, (1,), 3) < 1
    assert stopped.about_s == pytest.approx(12 + 5 / 2 * (10 + stopped.share * 48))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "1 s"), (48, "48 s"), (110, "1.8 min"), (5000, "1.4 h"), (4e5, "4.6 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
