"""How long a sweep takes, and how much of the training early stopping saves: expected before it is started.

Asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020) as Ray Tune
has it: a trial that reaches a rung is stopped if its value lies below the (1 - 1/reduction_factor) quantile of the
values that reached this rung before. The first one always goes on, and early ones are judged by few: of a short sweep
more than 1/reduction_factor of the trials pass each rung.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from sam3lora.cluster import most_workers
from sam3lora.config.training import images_per_step

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.tune.estimate.probe import Probe

RAY_START_S = 6.0
"""Seconds from a trial's start on Ray to its workers' first line, beside their imports: processes, their group and the
data tasks. 4 to 8 s on one host with two cores."""

_SIMULATIONS = 400


@dataclass(frozen=True)
class SweepTime:
    """Seconds.

    Attributes:
        trial_s: Of a whole trial: the quickest and the slowest of those that were probed.
        at_most_s: Of the sweep, if no trial is stopped early and all are as slow as the slowest.
        about_s: Of the sweep as early stopping is expected to go.
        share: Share of the epochs that this leaves.
    """

    trial_s: tuple[float, float]
    at_most_s: float
    about_s: float
    share: float


def sweep_time(
    probes: Sequence[tuple[Config, Probe]],
    *,
    num_trials: int,
    at_a_time: int,
    rungs: Sequence[int],
    reduction_factor: float,
) -> SweepTime:
    """How long a sweep takes, from what was measured with some of its configurations.

    Args:
        probes: Configurations of trials with what was measured.
        num_trials: Trials in all.
        at_a_time: How many run together.
        rungs: Epochs after which trials are compared, from `early_stopping.rungs`.
        reduction_factor: One of so many is to go on.
    """
    share = expected_share(num_trials, probes[0][0].training.num_epochs, tuple(rungs), reduction_factor)
    fill = max(first_visit_seconds(config, probe) for config, probe in probes)
    whole = [trial_seconds(config, probe) for config, probe in probes]
    shared = statistics.mean(trial_seconds(config, probe, share) for config, probe in probes)
    at_most = fill + math.ceil(num_trials / at_a_time) * max(whole)
    return SweepTime((min(whole), max(whole)), at_most, min(at_most, fill + num_trials / at_a_time * shared), share)


def trial_seconds(config: Config, probe: Probe, share: float = 1.0) -> float:
    """Seconds of a trial whose images have been seen before, with a share of its epochs.

    On Ray every one of its workers takes its share of the images, and data tasks decode ahead.
    """
    training, workers = config.training, max(most_workers(config), 1)
    steps_per_epoch = -(-probe.num_train // (images_per_step(training) * workers))
    steps = training.num_epochs * steps_per_epoch
    epochs = min(steps, training.max_steps or steps) / steps_per_epoch
    data_workers = _data_workers(config)
    images = epochs * probe.num_train * probe.train.seconds(data_workers)
    images += math.ceil(epochs) * probe.num_valid * probe.valid.seconds(data_workers)
    if probe.metrics_s and config.evaluation.every_epochs:
        images += math.ceil(epochs / config.evaluation.every_epochs) * probe.num_measured * probe.metrics_s
    start = probe.start_s + (RAY_START_S if config.scaling.num_workers else 0.0)
    return start + share * images / workers


def first_visit_seconds(config: Config, probe: Probe) -> float:
    """Seconds that the first trial alone spends on filling the caches."""
    data_workers = _data_workers(config)
    extra = probe.num_train * (probe.first_train.seconds(data_workers) - probe.train.seconds(data_workers))
    extra += probe.num_valid * (probe.first_valid.seconds(data_workers) - probe.valid.seconds(data_workers))
    return max(0.0, extra) / max(most_workers(config), 1) if probe.cache_bytes else 0.0


def _data_workers(config: Config) -> int:
    return config.training.num_workers if config.scaling.num_workers else 0


@lru_cache(maxsize=64)
def expected_share(num_trials: int, num_epochs: int, rungs: tuple[int, ...], reduction_factor: float) -> float:
    """Expected share of all epochs that is trained, in (0, 1].

    The mean over 400 seeded sweeps whose trials have values drawn at random, the same at every rung: learning curves
    that do not cross. Where they do, a trial that passes one rung is stopped at the next more often.

    Args:
        num_trials: Trials in all.
        num_epochs: Of a whole trial.
        rungs, reduction_factor: As of `sweep_time`.
    """
    if num_trials < 1 or not rungs:
        return 1.0
    draw = random.Random(0)
    epochs = sum(
        sum(epochs_trained([draw.random() for _ in range(num_trials)], num_epochs, rungs, reduction_factor))
        for _ in range(_SIMULATIONS)
    )
    return epochs / (_SIMULATIONS * num_trials * num_epochs)


def epochs_trained(
    values: Iterable[float], num_epochs: int, rungs: Sequence[int], reduction_factor: float
) -> list[int]:
    """Epochs that each trial gets.

    Args:
        values: One for each trial in the order they start; higher is better, at every rung the same.
        num_epochs: Of a whole trial.
        rungs, reduction_factor: As of `sweep_time`.

    >>> epochs_trained([3, 1, 2, 4], 9, [1, 3], 3)
    [9, 1, 1, 9]
    """
    reached: list[list[float]] = [[] for _ in rungs]
    trained = []
    for value in values:
        epochs = num_epochs
        for rung, before in zip(rungs, reached, strict=True):
            goes_on = not before or value >= _quantile(before, 1 - 1 / reduction_factor)
            bisect.insort(before, value)
            if not goes_on:
                epochs = rung
                break
        trained.append(epochs)
    return trained


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between neighbours by linear interpolation, as numpy has it."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def duration(seconds: float) -> str:
    """A time to plan with.

    >>> [duration(s) for s in (0.4, 48, 110, 5000, 20000, 400000)]
    ['1 s', '48 s', '1.8 min', '1.4 h', '5.6 h', '4.6 days']
    """
    for unit, size, least in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 90)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{math.ceil(seconds)} s"
