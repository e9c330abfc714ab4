"""The plan of a run: which images form which batch, in which order, on which worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class BatchPlan(NamedTuple):
    """One batch of one worker: `rows` are positions in the index."""

    epoch: int
    step: int
    rows: list[int]


def plan_epoch(num_images: int, **options: Any) -> list[list[int]]:
    """A rank's share of each step of one epoch, as `epoch_batches` gives them with the same options."""
    return epoch_batches(num_images, **options).tolist()


def epoch_batches(
    num_images: int,
    *,
    images_per_step: int,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> np.ndarray:
    """A rank's share of each step of one epoch.

    All ranks draw the same permutation of the images, pad it with its own first images to whole steps, and take their
    shares of each step. So the images of a step do not depend on the number of ranks.

    Without `shuffle` the order is that of the index.

    Returns:
        Positions int64 (S, share), in which S is `ceil(num_images / images_per_step)`; see `share_of`.
    """
    assert num_images > 0
    order = np.arange(num_images)
    if shuffle:
        order = np.random.default_rng([seed % 2**63, epoch]).permutation(num_images)
    share = share_of(images_per_step, world_size, rank)
    num_steps = -(-num_images // images_per_step)
    return np.resize(order, (num_steps, images_per_step))[:, share]


def share_of(images_per_step: int, world_size: int, rank: int) -> slice:
    """The places of a step's images that a rank takes. Shares differ by at most one; the first ranks have the larger.

    >>> [share_of(5, 3, rank) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    assert images_per_step > 0
    assert 0 <= rank < world_size
    size, larger = divmod(images_per_step, world_size)
    start = rank * size + min(rank, larger)
    return slice(start, start + size + (rank < larger))


def plan_run(
    num_images: int,
    *,
    images_per_step: int,
    num_epochs: int,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    start_epoch: int = 0,
    start_step: int = 0,
) -> Iterator[BatchPlan]:
    """A rank's shares of all epochs' steps from a step on. A resumed run gets exactly those that were left.

    No more than the order of one epoch is held at a time.
    """
    for epoch in range(start_epoch, num_epochs):
        batches = epoch_batches(
            num_images,
            images_per_step=images_per_step,
            world_size=world_size,
            rank=rank,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )
        first = start_step if epoch == start_epoch else 0
        for step in range(first, len(batches)):
            yield BatchPlan(epoch, step, batches[step].tolist())


def plan_validation(num_images: int, *, batch_size: int, world_size: int = 1, rank: int = 0) -> Iterator[BatchPlan]:
    """A rank's share of a split, in order; each image belongs to one rank.

    Ranks may get different numbers of batches, also none, so a loop over them must make no collective call.
    """
    assert batch_size > 0
    assert 0 <= rank < world_size
    rows = range(rank, num_images, world_size)
    for step, start in enumerate(range(0, len(rows), batch_size)):
        yield BatchPlan(0, step, list(rows[start : start + batch_size]))
