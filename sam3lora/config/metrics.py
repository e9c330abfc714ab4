"""The measurements by which a run chooses `best/` and a sweep its best trial."""

from __future__ import annotations

from typing import Literal

Task = Literal["detection", "dense", "clicks"]
BestMetric = Literal[
    "valid_loss",
    "map",
    "bbox_map",
    "cgf1",
    "mean_iou",
    "mean_iou_1",
    "mean_iou_2",
    "mean_iou_3",
    "mean_iou_5",
    "mean_iou_8",
    "mean_iou_20",
    "noc_80",
    "noc_85",
    "noc_90",
]

METRICS: dict[Task, tuple[BestMetric, ...]] = {
    "detection": ("map", "cgf1", "bbox_map"),
    "dense": ("mean_iou",),
    # Mean IoU after so many clicks, and clicks up to an IoU of so many percent. The third click decides: the first may
    # mean a part or the whole.
    "clicks": (
        *("mean_iou_3", "mean_iou_1", "mean_iou_2", "mean_iou_5", "mean_iou_8", "mean_iou_20"),
        *("noc_85", "noc_80", "noc_90"),
    ),
}
"""What is measured of a task beside the loss; the first one is what is taken if nothing is chosen."""


def is_lower_better(metric: str) -> bool:
    """Whether a small value is good: of a loss, and of a number of clicks."""
    return metric.endswith("_loss") or metric.startswith("noc_")
