"""How the terms are weighted and what they are divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossWeights:
    """Factor of each term; `o2m` multiplies the box, class and mask terms of the one-to-many branch once more."""

    bbox: float = 5.0
    giou: float = 2.0
    ce: float = 20.0
    presence: float = 20.0
    mask: float = 200.0
    dice: float = 10.0
    semantic: float = 20.0
    semantic_dice: float = 30.0
    o2m: float = 2.0

    def by_term(self) -> dict[str, float]:
        """The factor of each entry of `LossOutput.terms`."""
        o2o = {
            "loss_bbox": self.bbox,
            "loss_giou": self.giou,
            "loss_ce": self.ce,
            "loss_mask": self.mask,
            "loss_dice": self.dice,
        }
        return {
            **o2o,
            **{f"{name}_o2m": self.o2m * weight for name, weight in o2o.items()},
            "presence_loss": self.presence,
            "loss_semantic_seg": self.semantic,
            "loss_semantic_dice": self.semantic_dice,
        }


@dataclass(frozen=True)
class Normalizer:
    """What the terms are divided by: counts over the whole optimizer step (all chunks, micro-batches and workers),
    divided by the number of workers because gradients are averaged over workers; and `scale`, the square root of all
    workers' queries.

    With it, the mean over workers of the summed chunk gradients is the gradient of one worker that sees everything at
    once.
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
