"""Intersection over union and dice of SAM 3's semantic output: all pixels of a prompt, whatever object they belong to.

Shapes: `C` categories, `h` `w` the size of the logits, `H` `W` that of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3lora.data.label_maps import LabelMaps
from sam3lora.engine.dense_maps import over_threshold
from sam3lora.evaluation.dense.class_counts import ClassCounts, Counts, mean_or_none, number_or_none, ratio
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory
from sam3lora.label_values import IGNORE

DECISION = 0.5
"""Probability from which a pixel belongs to a prompt."""


@dataclass(frozen=True)
class SemanticMetrics:
    """Metrics of the semantic output in [0, 1], of the pixels of all images; None where a category has none.

    Attributes:
        mean_iou, mean_dice: Means over categories, each against all else.
        per_category: IoU of each category.
    """

    mean_iou: float | None
    mean_dice: float | None
    per_category: list[float | None]

    @classmethod
    def of(cls, counts: Counts) -> SemanticMetrics:
        """From the pixels (C,) of all images."""
        iou_C = counts.iou()
        dice_C = ratio(2 * counts.hits, counts.truth + counts.prediction)
        return cls(mean_or_none(iou_C), mean_or_none(dice_C), [number_or_none(iou) for iou in iou_C])


def count_semantic(
    records: Sequence[Mapping[str, Any]],
    categories: Sequence[PromptedCategory],
    logits: Sequence[Sequence[np.ndarray]],
    incomplete: Set[int] = frozenset(),
) -> ClassCounts:
    """Compare the logits of each record's image for each category with the union of its masks.

    Crowd regions and objects without a mask count nowhere.

    Args:
        logits: (h, w) for each record, for each category.
        incomplete: Ids of the categories that count only in images with a label of them.
    """
    counts = ClassCounts(len(categories))
    for record, of_image in zip(records, logits, strict=True):
        rows_C3 = [
            _count(record, category, logits_hw, category.id in incomplete)
            for category, logits_hw in zip(categories, of_image, strict=True)
        ]
        counts.add(record["image_id"], Counts(*np.array(rows_C3, np.int64).reshape(-1, 3).T))
    return counts


def _count(
    record: Mapping[str, Any], category: PromptedCategory, logits_hw: np.ndarray, only_if_shown: bool
) -> tuple[int, int, int]:
    """Pixels of the truth, of the prediction, and of both."""
    (truth_HW,) = LabelMaps(dict.fromkeys(category.name_keys, 1)).of_record(record)
    is_true_HW = truth_HW == 1
    if only_if_shown and not is_true_HW.any():
        return 0, 0, 0
    found_HW = over_threshold(logits_hw, (truth_HW.shape[0], truth_HW.shape[1]), DECISION) & (truth_HW != IGNORE)
    return int(is_true_HW.sum()), int(found_HW.sum()), int((found_HW & is_true_HW).sum())
