"""Boundary IoU: intersection over union of the pixels near the contours, for errors that IoU of large areas hides.

    boundary of class c = pixels of c with another class, or the image's border, within d pixels (rows and columns)
    boundary IoU = |true boundary and predicted boundary, both of c| / |true or predicted boundary of c|

Source: Cheng et al. 2021, "Boundary IoU", https://arxiv.org/abs/2103.16562. d is 2 % of the image's diagonal, rounded,
at least 1. As with IoU, pixels are summed over the set before division.

Shapes: `I` images, `N` classes (label 0 is the background), `H` `W` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from sam3lora.evaluation.dense.class_counts import (
    ClassCounts,
    Counts,
    check_names,
    checked_labels,
    mean_or_none,
    number_or_none,
    weighted,
)
from sam3lora.evaluation.metrics.bootstrap import Metric
from sam3lora.label_values import BACKGROUND

DILATION_RATIO = 0.02
"""Width of the boundary as a share of the image's diagonal."""


@dataclass(frozen=True)
class BoundaryMetrics:
    """Boundary IoU in [0, 1], pooled over a set; None where a class has no boundary in the truth or a prediction.

    Attributes:
        mean: Mean of the classes that have one.
        mean_foreground: The same without the background.
        per_class: Class name -> its boundary IoU.
    """

    mean: float | None
    mean_foreground: float | None
    per_class: dict[str, float | None]


class BoundaryIou:
    """Boundary IoU of every class over a set of label maps. Pixels whose truth is 255 count nowhere.

    Nor do such pixels make a boundary: an object whose neighbours within d are all ignored has none there.

    Args:
        class_names: Names of labels 0, 1, ...; the first is the background.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = check_names(class_names)
        self.counts = ClassCounts(len(self.class_names))

    def add(self, prediction_HW: np.ndarray, truth_HW: np.ndarray, *, image_id: int) -> None:
        """Count the boundary pixels of an image.

        Raises:
            ValueError: The image was counted before, the sizes differ, or a label is out of range.
        """
        size = len(self.class_names)
        prediction, truth, valid = checked_labels(prediction_HW, truth_HW, size)
        width = boundary_width(truth.shape)
        near_truth, near_prediction = (near_contour(labels, valid, width) for labels in (truth, prediction))
        hits = near_truth & near_prediction & (truth == prediction)
        self.counts.add(
            image_id,
            Counts(
                *(
                    np.bincount(labels[chosen], minlength=size)
                    for labels, chosen in ((truth, near_truth), (prediction, near_prediction), (truth, hits))
                )
            ),
        )

    def merge(self, other: BoundaryIou) -> None:
        """Add what another worker counted on other images.

        Raises:
            ValueError: The classes differ, or an image was counted on both sides.
        """
        if self.class_names != other.class_names:
            raise ValueError(f"expected classes {self.class_names}, got {other.class_names}")
        self.counts.merge(other.counts)

    def values(self) -> BoundaryMetrics:
        counts = self.counts.total()
        iou_N = counts.iou()
        return BoundaryMetrics(
            mean=mean_or_none(iou_N),
            mean_foreground=mean_or_none(np.delete(iou_N, BACKGROUND)),
            per_class={name: number_or_none(iou_N[label]) for label, name in enumerate(self.class_names)},
        )

    def mean_metric(self) -> Metric:
        """The mean as a function of image weights (I,), for the bootstrap."""
        counts_I3N = self.counts.per_image()
        return lambda image_weights_I: mean_or_none(weighted(counts_I3N, image_weights_I).iou())


def boundary_width(size_hw: tuple[int, ...]) -> int:
    """Width of the boundary in pixels.

    >>> boundary_width((1008, 1008))
    29
    """
    return max(1, round(DILATION_RATIO * math.hypot(*size_hw)))


def near_contour(labels_HW: np.ndarray, valid_HW: np.ndarray, width: int) -> np.ndarray:
    """Valid pixels (bool) with a valid pixel of another class, or the image's border, within `width` rows and columns.

    One pass serves all classes: a pixel is far from every contour where the least and the greatest label around it are
    the same. Ignored pixels are neither.
    """
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * width + 1,) * 2)
    least = cv2.erode(np.where(valid_HW, labels_HW, 255).astype(np.uint8), square)
    greatest = cv2.dilate(np.where(valid_HW, labels_HW, 0).astype(np.uint8), square)
    near_HW = least != greatest
    for edge in (near_HW[:width], near_HW[-width:], near_HW[:, :width], near_HW[:, -width:]):
        edge[...] = True
    return near_HW & valid_HW
