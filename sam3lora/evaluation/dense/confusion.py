"""The confusion matrix of a set of label maps, and what is read off it: IoU, precision, recall, accuracy.

Shapes: `I` images, `N` classes (label 0 is the background), `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam3lora.evaluation.dense.class_counts import (
    ClassCounts,
    Counts,
    check_names,
    checked_labels,
    mean_or_none,
    number_or_none,
    ratio,
    weighted,
)
from sam3lora.evaluation.metrics.bootstrap import Metric, Metrics
from sam3lora.label_values import BACKGROUND


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class over all pixels of the set, in [0, 1].

    Attributes:
        iou: None if the class occurs neither in the truth nor in a prediction.
        precision: None if the class is never predicted.
        recall: None if the truth has no pixel of it.
        pixels: Number of pixels in the truth.
    """

    iou: float | None
    precision: float | None
    recall: float | None
    pixels: int


@dataclass(frozen=True)
class LabelMetrics:
    """Metrics of label maps over all pixels of a set, in [0, 1]; None without a pixel or a class to measure.

    Attributes:
        mean_iou: Mean IoU of the classes that occur in the truth or in a prediction.
        mean_iou_foreground: The same without the background.
        pixel_accuracy: Share of pixels with the right label.
        frequency_weighted_iou: IoU of the classes, weighted by their share of the true pixels.
        notes: Which values are None, and why.
    """

    num_images: int
    mean_iou: float | None
    mean_iou_foreground: float | None
    pixel_accuracy: float | None
    frequency_weighted_iou: float | None
    per_class: dict[str, ClassMetrics]
    notes: list[str]


class ConfusionMatrix:
    """Counts how often each true class got each label. Pixels whose truth is 255 count nowhere.

    Args:
        class_names: Names of labels 0, 1, ...; the first is the background.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = check_names(class_names)
        size = len(self.class_names)
        self.matrix_NN = np.zeros((size, size), dtype=np.int64)
        """Pixels by true class (row) and predicted class (column)."""
        self.counts = ClassCounts(size)

    def add(self, prediction_HW: np.ndarray, truth_HW: np.ndarray, *, image_id: int) -> None:
        """Count the pixels of an image.

        Raises:
            ValueError: The image was counted before, the sizes differ, or a label is out of range.
        """
        size = len(self.class_names)
        prediction, truth, valid = checked_labels(prediction_HW, truth_HW, size)
        pairs = truth[valid].astype(np.int32) * size + prediction[valid]
        own_NN = np.bincount(pairs, minlength=size * size).reshape(size, size)
        self.counts.add(image_id, Counts(own_NN.sum(axis=1), own_NN.sum(axis=0), own_NN.diagonal()))
        self.matrix_NN += own_NN

    def merge(self, other: ConfusionMatrix) -> None:
        """Add what another worker counted on other images.

        Raises:
            ValueError: The classes differ, or an image was counted on both sides.
        """
        if self.class_names != other.class_names:
            raise ValueError(f"expected classes {self.class_names}, got {other.class_names}")
        self.counts.merge(other.counts)
        self.matrix_NN += other.matrix_NN

    def values(self) -> LabelMetrics:
        counts = Counts(self.matrix_NN.sum(axis=1), self.matrix_NN.sum(axis=0), self.matrix_NN.diagonal())
        iou_N, precision_N, recall_N = (
            counts.iou(),
            ratio(counts.hits, counts.prediction),
            ratio(counts.hits, counts.truth),
        )
        per_class = {
            name: ClassMetrics(
                number_or_none(iou_N[label]),
                number_or_none(precision_N[label]),
                number_or_none(recall_N[label]),
                int(counts.truth[label]),
            )
            for label, name in enumerate(self.class_names)
        }
        return LabelMetrics(
            num_images=len(self.counts),
            per_class=per_class,
            notes=_notes(per_class),
            **{name: compute(counts) for name, compute in _MEASURES.items()},
        )

    def metric(self, name: str) -> Metric:
        """A mean of `LabelMetrics`, or `iou/CLASS`, as a function of image weights (I,), for the bootstrap.

        The weights are those of the images in the order of `counts.image_ids`.
        """
        counts_I3N = self.counts.per_image()
        if name.startswith("iou/"):
            label = self.class_names.index(name.removeprefix("iou/"))
            return lambda image_weights_I: number_or_none(weighted(counts_I3N, image_weights_I).iou()[label])
        compute = _MEASURES[name]
        return lambda image_weights_I: compute(weighted(counts_I3N, image_weights_I))

    def all_metrics(self) -> Metrics:
        """All that `metric` knows at once, summed once for each weighting."""
        counts_I3N = self.counts.per_image().astype(np.float64)  # sums of floats are quicker, and exact to 2^53

        def measure(image_weights_I: np.ndarray) -> dict[str, float | None]:
            counts = weighted(counts_I3N, image_weights_I)
            classes = zip(self.class_names, counts.iou().tolist(), strict=True)
            return {name: compute(counts) for name, compute in _MEASURES.items()} | {
                f"iou/{name}": number_or_none(iou) for name, iou in classes
            }

        return measure


def _accuracy(counts: Counts) -> float | None:
    total = counts.truth.sum()
    return float(counts.hits.sum() / total) if total else None


def _frequency_weighted_iou(counts: Counts) -> float | None:
    total = counts.truth.sum()
    return float((counts.truth * np.nan_to_num(counts.iou())).sum() / total) if total else None


_MEASURES = {
    "mean_iou": lambda counts: mean_or_none(counts.iou()),
    "mean_iou_foreground": lambda counts: mean_or_none(np.delete(counts.iou(), BACKGROUND)),
    "pixel_accuracy": _accuracy,
    "frequency_weighted_iou": _frequency_weighted_iou,
}


def _notes(per_class: dict[str, ClassMetrics]) -> list[str]:
    reasons = (
        ("iou", "occurs neither in the truth nor in a prediction, so it has no IoU and no part in the mean"),
        ("precision", "is never predicted, so it has no precision"),
        ("recall", "has no pixel in the truth, so it has no recall"),
    )
    notes = []
    for name, values in per_class.items():
        reason = next((text for key, text in reasons if getattr(values, key) is None), None)
        if reason is not None:
            notes.append(f"{name}: {reason}")
    if not any(values.pixels for values in per_class.values()):
        notes.append("no pixel has a true label, so there is no accuracy")
    return notes
