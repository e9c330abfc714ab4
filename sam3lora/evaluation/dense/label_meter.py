"""`LabelMeter`: measures what a dense head says of images, in any mode, one image at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sam3lora.data.label_maps import LabelMaps
from sam3lora.engine.dense_maps import label_maps
from sam3lora.evaluation.dense.class_counts import mean_or_none
from sam3lora.evaluation.dense.confusion import ConfusionMatrix
from sam3lora.model.dense.settings import DenseSettings

LOGGED = ("mean_iou", "mean_iou_foreground", "pixel_accuracy")


class LabelMeter:
    """Compares the labels of images with the truth, at the size of the images.

    Classes that may overlap are each measured against all else.
    """

    def __init__(self, settings: DenseSettings, labels: LabelMaps) -> None:
        self.settings, self.labels = settings, labels
        self.matrices = [ConfusionMatrix(names) for names in settings.names_of_maps]

    def add(self, logits_Nhw: np.ndarray, record: Mapping[str, Any], size_hw: tuple[int, int] | None = None) -> None:
        """Measure one image.

        Args:
            logits_Nhw: Of the head.
            record: Of the index, with its labels.
            size_hw: Size of the decoded image, if it is not the annotated one.
        """
        truth_MHW = self.labels.of_record(record, size_hw)
        own_hw = (truth_MHW.shape[1], truth_MHW.shape[2])
        predicted_MHW = label_maps(logits_Nhw, own_hw, self.settings.mode, self.settings.threshold)
        self.add_maps(predicted_MHW, truth_MHW, image_id=int(record["image_id"]))

    def add_maps(self, predicted_MHW: np.ndarray, truth_MHW: np.ndarray, *, image_id: int) -> None:
        """Measure one image by its label maps: one, or one for each class that may overlap others."""
        for matrix, predicted_HW, truth_HW in zip(self.matrices, predicted_MHW, truth_MHW, strict=True):
            matrix.add(predicted_HW, truth_HW, image_id=image_id)

    def merge(self, other: LabelMeter) -> None:
        """Add what another worker measured on other images."""
        for own, theirs in zip(self.matrices, other.matrices, strict=True):
            own.merge(theirs)

    def values(self) -> dict[str, float | None]:
        """The `LOGGED` metrics; of classes that may overlap the means over classes."""
        found = [matrix.values() for matrix in self.matrices]
        return {name: mean_of_known(getattr(one, name) for one in found) for name in LOGGED}


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    return mean_or_none(np.array([np.nan if value is None else value for value in values]))
