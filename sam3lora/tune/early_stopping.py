"""Giving up early on trials that fall behind: asynchronous successive halving (ASHA) by Ray Tune.

At each rung (``grace_epochs``, then that times ``reduction_factor`` and so on) a trial goes on if its metric is among
the best 1 / ``reduction_factor`` of all that have come so far. https://arxiv.org/abs/1810.05934
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam3lora.tune.space import SearchSpace


def rungs(space: SearchSpace) -> list[int]:
    """Epochs after which trials are compared, fewest first; empty without early stopping.

    None is at the last epoch, where there is nothing left to save, nor where the metric is not measured.
    """
    settings, last = space.early_stopping, space.base.training.num_epochs
    if settings.scheduler == "none":
        return []
    every = 1 if space.search.metric == "valid_loss" else space.search.every_epochs
    first = settings.grace_epochs or max(1, round(last / settings.reduction_factor**2))
    found, rung = [], -(-first // every) * every
    while rung < last:
        found.append(rung)
        rung = -(-int(rung * settings.reduction_factor) // every) * every
    return found
