"""`LabelMeter`: measures what a dense head says of images, in any mode, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam3lora.data.label_maps import LabelMaps
from sam3lora.engine.dense_maps import best_labels, over_threshold
from sam3lora.evaluation.dense.class_counts import mean_or_none
from sam3lora.evaluation.dense.confusion import ConfusionMatrix
from sam3lora.model.dense.settings import BACKGROUND, DenseSettings

LOGGED = ("mean_iou", "mean_iou_foreground", "pixel_accuracy")


class LabelMeter:
    """Compares the labels of images with the truth, at the size of the images.

    Classes that may overlap are each measured against all else.
    """

    def __init__(self, settings: DenseSettings, labels: LabelMaps) -> None:
        self.settings, self.labels = settings, labels
        names = settings.classes
        if settings.mode == "multiclass":
            self.matrices = [ConfusionMatrix(names)]
        else:
            self.matrices = [ConfusionMatrix((BACKGROUND, name)) for name in names]

    def add(self, logits_Nhw: np.ndarray, record: Mapping[str, Any], size_hw: tuple[int, int] | None = None) -> None:
        """Measure one image.

        Args:
            logits_Nhw: Of the head.
            record: Of the index, with its labels.
            size_hw: Size of the decoded image, if it is not the annotated one.
        """
        truth_NHW = self.labels.of_record(record, size_hw)
        own_hw = truth_NHW.shape[1:]
        for number, matrix in enumerate(self.matrices):
            if self.settings.mode == "multiclass":
                predicted_HW = best_labels(logits_Nhw, own_hw)
            else:
                found_HW = over_threshold(logits_Nhw[number], own_hw, self.settings.threshold)
                predicted_HW = found_HW.astype(np.uint8)
            matrix.add(predicted_HW, truth_NHW[number], image_id=int(record["image_id"]))

    def merge(self, other: LabelMeter) -> None:
        """Add what another worker measured on other images."""
        for own, theirs in zip(self.matrices, other.matrices, strict=True):
            own.merge(theirs)

    def values(self) -> dict[str, float | None]:
        """The `LOGGED` metrics; of classes that may overlap the means over classes."""
        found = [matrix.values() for matrix in self.matrices]
        return {name: _mean([getattr(one, name) for one in found]) for name in LOGGED}


def _mean(values: list[float | None]) -> float | None:
    return mean_or_none(np.array([np.nan if value is None else value for value in values]))
