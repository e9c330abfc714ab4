"""Giving up early on trials that fall behind: asynchronous successive halving (ASHA) by Ray Tune.

At each rung (``grace_epochs``, then that times ``reduction_factor`` and so on) a trial goes on if its metric is among
the best 1 / ``reduction_factor`` of all that have come so far. https://arxiv.org/abs/1810.05934
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sam3lora.config.training import images_per_step

if TYPE_CHECKING:
    from sam3lora.tune.space.reader import SearchSpace


def rungs(space: SearchSpace, num_train_images: int | None = None) -> list[int]:
    """Epochs after which trials are compared, fewest first; empty without early stopping.

    None is at the last epoch, where there is nothing left to save, nor where the metric is not measured.

    Args:
        space: of the sweep.
        num_train_images: tells how many epochs ``training.max_steps`` leaves.
    """
    settings, last = space.early_stopping, num_epochs(space, num_train_images)
    if settings.scheduler == "none":
        return []
    every = 1 if space.search.metric == "valid_loss" else space.search.every_epochs
    first = settings.grace_epochs or max(1, round(last / settings.reduction_factor**2))
    found, rung = [], -(-first // every) * every
    while rung < last:
        found.append(rung)
        rung = -(-int(rung * settings.reduction_factor) // every) * every
    return found


def num_epochs(space: SearchSpace, num_train_images: int | None) -> int:
    """Epochs of a trial, the last one perhaps cut short by ``training.max_steps``."""
    training, workers = space.base.training, space.base.scaling.num_workers
    if training.max_steps is None or num_train_images is None:
        return training.num_epochs
    most_workers = max(1, workers if isinstance(workers, int) else workers[1])
    steps_per_epoch = math.ceil(num_train_images / (images_per_step(training) * most_workers))
    return min(training.num_epochs, math.ceil(training.max_steps / steps_per_epoch))
