"""Early stopping by asynchronous successive halving (ASHA): when trials are compared, and which fall behind.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020, https://arxiv.org/abs/1810.05934
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from sam3lora.cluster import most_workers
from sam3lora.config.training import images_per_step
from sam3lora.tune.space.search_space import SearchSpace


def rungs(space: SearchSpace, num_train_images: int | None = None) -> list[int]:
    """Epochs after which trials are compared, fewest first; empty without early stopping.

    The first is `grace_epochs`, each further one `reduction_factor` times the one before. None is at the last epoch,
    where there is nothing left to save, nor where the metric is not measured. `num_train_images` tells how many epochs
    `training.max_steps` leaves.
    """
    settings, last = space.early_stopping, _num_epochs(space, num_train_images)
    if settings.scheduler == "none":
        return []
    every = 1 if space.search.metric == "valid_loss" else space.search.every_epochs
    first = settings.grace_epochs or max(1, round(last / settings.reduction_factor**2))
    found, rung = [], -(-first // every) * every
    while rung < last:
        found.append(rung)
        rung *= settings.reduction_factor
    return found


def _num_epochs(space: SearchSpace, num_train_images: int | None) -> int:
    """Epochs of a trial; `training.max_steps` may cut the last one short."""
    training = space.base.training
    if training.max_steps is None or num_train_images is None:
        return training.num_epochs
    images = images_per_step(training, max(1, most_workers(space.base)))
    return min(training.num_epochs, math.ceil(training.max_steps / math.ceil(num_train_images / images)))


class SuccessiveHalving:
    """Decides at each rung whether a trial is among the best 1 / `reduction_factor` of those that reached it before.

    The first trial at a rung always goes on, and early ones are compared with few: in a short sweep more trials than
    1 / `reduction_factor` pass.

    >>> halving = SuccessiveHalving([1, 3], 3)
    >>> [halving.falls_behind(number, 1, score) for number, score in enumerate([0.3, 0.1, 0.2, 0.4])]
    [False, True, True, False]
    """

    def __init__(self, rungs: Sequence[int], reduction_factor: float) -> None:
        self._share = 1 - 1 / reduction_factor
        self._scores: dict[int, list[float]] = {rung: [] for rung in rungs}  # in rising order
        self._judged: set[tuple[int, int]] = set()

    def falls_behind(self, number: int, epoch: int, score: float | None) -> bool:
        """Record a trial's score at the highest rung that it has reached, and compare it there.

        A higher score is better; None or NaN decides nothing.
        """
        rung = max((rung for rung in self._scores if epoch >= rung), default=None)
        if rung is None or (rung, number) in self._judged or score is None or math.isnan(score):
            return False
        before = self._scores[rung]
        is_behind = bool(before) and score < self._quantile(before)
        self._judged.add((rung, number))
        bisect.insort(before, score)
        return is_behind

    def _quantile(self, scores: list[float]) -> float:
        place = self._share * (len(scores) - 1)
        low, high = scores[math.floor(place)], scores[math.ceil(place)]
        return low + (place % 1) * (high - low)
