"""The counts that the loss terms are divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Normalizer:
    """Divisors of the loss terms, from the counts of a whole optimizer step.

    The counts cover all chunks, micro-batches and workers, and are divided by the number of workers because gradients
    are averaged over workers. `scale` is the square root of all workers' queries. So the mean over workers of the
    summed chunk gradients is the gradient of one worker that sees the whole step.
    """

    num_queries: float
    num_boxes: float
    num_semantic: float
    scale: float

    @classmethod
    def from_counts(cls, num_queries: float, num_boxes: float, num_semantic: float, world_size: int = 1) -> Normalizer:
        """From the step's totals over all workers: queries, targets, and queries with a non-empty semantic target."""
        return cls(
            num_queries=max(num_queries, 1) / world_size,
            num_boxes=max(num_boxes, 1) / world_size,
            num_semantic=(num_semantic + 1e-6) / world_size,
            scale=math.sqrt(num_queries),
        )
