"""How long a sweep takes, and the share of the training that early stopping leaves, estimated from probes."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sam3lora.cluster import most_workers
from sam3lora.config import Config
from sam3lora.config.training import images_per_step
from sam3lora.tune.estimate.probe import Probe, data_workers
from sam3lora.tune.search.early_stopping import SuccessiveHalving

RAY_START_S = 6.0
"""Seconds from a trial's start on Ray to its workers' first line, beside their imports: processes, their group and the
data tasks. 4 to 8 s on one host with two cores."""

_SIMULATED_TRIALS = 4800


@dataclass(frozen=True)
class SweepTime:
    """Seconds.

    Attributes:
        trial_s: Of a whole trial: the quickest and the slowest of those that were probed.
        at_most_s: Of the sweep, if no trial is stopped early and all are as slow as the slowest.
        about_s: Of the sweep, with the expected early stopping.
        share: Expected share of the epochs that are trained.
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
    """How long a sweep takes, from probes of some trials' configurations."""
    share = expected_share(num_trials, probes[0][0].training.num_epochs, tuple(rungs), reduction_factor)
    fill = max(cache_filling_seconds(config, probe) for config, probe in probes)
    whole = [trial_seconds(config, probe) for config, probe in probes]
    shared = statistics.mean(trial_seconds(config, probe, share) for config, probe in probes)
    at_most = fill + math.ceil(num_trials / at_a_time) * max(whole)
    return SweepTime((min(whole), max(whole)), at_most, min(at_most, fill + num_trials / at_a_time * shared), share)


def trial_seconds(config: Config, probe: Probe, share: float = 1.0) -> float:
    """Seconds of a trial whose images are in the caches, with a share of its epochs.

    On Ray each worker takes its share of the images, and data tasks decode ahead.
    """
    training, workers = config.training, max(most_workers(config), 1)
    steps_per_epoch = -(-probe.num_train // images_per_step(training, workers))
    steps = training.num_epochs * steps_per_epoch
    epochs = min(steps, training.max_steps or steps) / steps_per_epoch
    decoders = data_workers(config)
    seconds = epochs * probe.num_train * probe.train.seconds(decoders)
    seconds += math.ceil(epochs) * probe.num_valid * probe.valid.seconds(decoders)
    if probe.metrics_s and config.evaluation.every_epochs:
        seconds += math.ceil(epochs / config.evaluation.every_epochs) * probe.num_measured * probe.metrics_s
    start = probe.start_s + (RAY_START_S if config.scaling.num_workers else 0.0)
    return start + share * seconds / workers


def cache_filling_seconds(config: Config, probe: Probe) -> float:
    """Seconds that the first trial alone spends on filling the caches."""
    decoders = data_workers(config)
    extra = probe.num_train * (probe.first_train.seconds(decoders) - probe.train.seconds(decoders))
    extra += probe.num_valid * (probe.first_valid.seconds(decoders) - probe.valid.seconds(decoders))
    return max(0.0, extra) / max(most_workers(config), 1) if probe.cache_bytes else 0.0


@lru_cache(maxsize=64)
def expected_share(num_trials: int, num_epochs: int, rungs: tuple[int, ...], reduction_factor: float) -> float:
    """Expected share of all epochs that is trained, in (0, 1].

    The mean over simulated sweeps, stopped by the same rule as real ones, in which a trial keeps one random score at
    all rungs: learning curves that do not cross. If they do, more trials are stopped at later rungs.
    """
    if num_trials < 1 or not rungs:
        return 1.0
    draw, epochs, num_sweeps = random.Random(0), 0, -(-_SIMULATED_TRIALS // num_trials)
    for _ in range(num_sweeps):
        halving = SuccessiveHalving(rungs, reduction_factor)
        for number in range(num_trials):
            score = draw.random()
            epochs += next((rung for rung in rungs if halving.falls_behind(number, rung, score)), num_epochs)
    return epochs / (num_sweeps * num_trials * num_epochs)


def duration(seconds: float) -> str:
    """A time to plan with.

    >>> [duration(s) for s in (0.4, 48, 110, 5000, 20000, 400000)]
    ['1 s', '48 s', '1.8 min', '1.4 h', '5.6 h', '4.6 days']
    """
    for unit, size, least in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 90)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{math.ceil(seconds)} s"
