"""Pixels of every class in each image, and intersection over union from them.

Shapes: `I` images, `N` classes, `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam3lora.evaluation.dense.image_rows import ImageRows
from sam3lora.label_values import IGNORE


class Counts(NamedTuple):
    """Pixels (N,) of every class in the truth, in the prediction and in both, of one image or summed over several."""

    truth: np.ndarray
    prediction: np.ndarray
    hits: np.ndarray

    def iou(self) -> np.ndarray:
        """Hits / (truth + prediction - hits) in [0, 1]; NaN for a class that occurs in neither."""
        return ratio(self.hits, self.truth + self.prediction - self.hits)


class ClassCounts:
    """Pixels of every class in each image of a set."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows = ImageRows((3, num_classes), np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_ids(self) -> list[int]:
        return self._rows.image_ids

    def add(self, image_id: int, counts: Counts) -> None:
        self._rows.add(image_id, np.stack(counts))

    def merge(self, other: ClassCounts) -> None:
        if self.num_classes != other.num_classes:
            raise ValueError(f"expected counts of {self.num_classes} classes, got {other.num_classes}")
        self._rows.merge(other._rows)

    def per_image(self) -> np.ndarray:
        """(I, 3, N) in the order of `image_ids`."""
        return self._rows.stacked()

    def total(self) -> Counts:
        return Counts(*self.per_image().sum(axis=0))


def weighted(counts_I3N: np.ndarray, image_weights_I: np.ndarray) -> Counts:
    """Counts of a set in which each image occurs as often as its weight says."""
    return Counts(*np.tensordot(image_weights_I, counts_I3N, axes=1))


def checked_labels(
    prediction_HW: np.ndarray, truth_HW: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction and truth as uint8 label maps of one size, and which pixels are not ignored.

    Raises:
        ValueError: The sizes differ, a prediction is not below `num_classes`, or a truth is neither that nor 255.
    """
    if prediction_HW.shape != truth_HW.shape or prediction_HW.ndim != 2:
        raise ValueError(f"expected two label maps of one size, got {prediction_HW.shape} and {truth_HW.shape}")
    valid_HW = truth_HW != IGNORE
    for name, labels_HW, checked_HW in (
        ("predicted", prediction_HW, None),
        ("true", truth_HW, valid_HW),
    ):
        used = labels_HW if checked_HW is None else labels_HW[checked_HW]
        if used.size and not 0 <= used.min() <= used.max() < num_classes:
            wrong = int(used.max() if used.max() >= num_classes else used.min())
            raise ValueError(f"expected {name} labels from 0 to {num_classes - 1}, got {wrong}")
    return prediction_HW.astype(np.uint8, copy=False), truth_HW.astype(np.uint8, copy=False), valid_HW


def check_names(class_names: Sequence[str]) -> list[str]:
    """The names, which have to fit 8-bit labels.

    Raises:
        ValueError: There is none, a name occurs twice, or there are more than 255.
    """
    if not 0 < len(class_names) <= IGNORE or len(set(class_names)) < len(class_names):
        raise ValueError(f"expected 1 to {IGNORE} different class names, got {list(class_names)}")
    return list(class_names)


def ratio(part_N: np.ndarray, whole_N: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    return np.divide(part_N, whole_N, out=np.full(np.shape(part_N), np.nan), where=np.asarray(whole_N) != 0)


def mean_or_none(values: np.ndarray) -> float | None:
    """Mean of the values that are not NaN; None without any.

    >>> mean_or_none(np.array([0.5, np.nan, 1.0]))
    0.75
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def number_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
