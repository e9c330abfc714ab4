"""Average precision for given image weights, from a table of matches.

Shape legend: `T` IoU thresholds, `D` detections of a category, `N` of them that are right, `I` images, `R` recalls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sam3lora.evaluation.metrics.matching import MASKS, MatchTable, flags_of

RECALLS_R = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class CategoryDetections:
    """Detections of one category over all images, best score first, ties in ascending order of image ids.

    Attributes:
        image_index_D: Position of the image.
        is_matched_TD: Whether it is matched to an object, or to a crowd region (then it is ignored too).
        is_ignored_TD: Whether it counts as neither right nor wrong.
        num_objects_I: Number of objects in each image, without crowd regions.
    """

    scores_D: np.ndarray
    image_index_D: np.ndarray
    is_matched_TD: np.ndarray
    is_ignored_TD: np.ndarray
    num_objects_I: np.ndarray

    @classmethod
    def of(cls, table: MatchTable, category: int, comparison: int = MASKS) -> CategoryDetections:
        """The detections of a category, by its position, for one of the comparisons."""
        rows = table.rows_of_category[category]
        rows = rows[np.argsort(-table.score_D[rows], kind="stable")]
        return cls(
            scores_D=table.score_D[rows],
            image_index_D=table.image_D[rows],
            is_matched_TD=flags_of(table.matched_DK[rows, comparison]),
            is_ignored_TD=flags_of(table.ignored_DK[rows, comparison]),
            num_objects_I=table.num_objects_KIC[comparison, :, category],
        )

    @cached_property
    def is_right_TD(self) -> np.ndarray:
        return self.is_matched_TD & ~self.is_ignored_TD

    @cached_property
    def is_wrong_TD(self) -> np.ndarray:
        return ~self.is_matched_TD & ~self.is_ignored_TD

    @cached_property
    def _counted_CD(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows of "the detection counts" (a single one without crowds), and the row of each threshold."""
        row_of: dict[bytes, int] = {}
        row_T = np.array([row_of.setdefault(flags_D.tobytes(), len(row_of)) for flags_D in self.is_ignored_TD])
        _, first_C = np.unique(row_T, return_index=True)
        return ~self.is_ignored_TD[first_C], row_T

    @cached_property
    def _right_at_TN(self) -> list[np.ndarray]:
        return [np.flatnonzero(row) for row in self.is_right_TD]

    def recall(self) -> np.ndarray | None:
        """Share (T,) of the objects that are found; None without objects."""
        num_objects = self.num_objects_I.sum()
        return self.is_right_TD.sum(axis=1) / num_objects if num_objects else None

    def precision(self, image_weights_I: np.ndarray | None = None) -> np.ndarray | None:
        """Interpolated precision (T, R) at each IoU threshold and recall, in [0, 1]; None if no object has a weight.

        It is computed at right detections only, where recall rises: it falls everywhere else, and the interpolation
        takes the best precision at a recall or above. Weights of None are 1.
        """
        weights_I = np.ones(len(self.num_objects_I), dtype=int) if image_weights_I is None else image_weights_I
        num_objects = weights_I @ self.num_objects_I
        if num_objects == 0:
            return None
        weights_D = weights_I[self.image_index_D]
        counted_CD, row_T = self._counted_CD
        num_counted_CD = np.cumsum(counted_CD * weights_D, axis=1)
        found_TR = np.zeros((len(row_T), len(RECALLS_R)))
        for threshold, right_N in enumerate(self._right_at_TN):
            num_right_N = np.cumsum(weights_D[right_N])
            precision_N = num_right_N / (num_counted_CD[row_T[threshold], right_N] + np.spacing(1))
            # Precision is 0 at recalls that are never reached.
            best_N = np.append(np.maximum.accumulate(precision_N[::-1])[::-1], 0)
            found_TR[threshold] = best_N[np.searchsorted(num_right_N / num_objects, RECALLS_R)]
        return found_TR


def category_detections(table: MatchTable) -> list[CategoryDetections]:
    """The matches of masks of all sizes, for each category."""
    return [CategoryDetections.of(table, category) for category in range(table.num_categories)]


def average_precision(
    detections: Iterable[CategoryDetections], image_weights_I: np.ndarray | None = None
) -> float | None:
    """mAP with each image counted as often as its weight: the mean over thresholds and categories with objects.

    With weights of 1 it is pycocotools' mAP (101 recalls, https://cocodataset.org/#detection-eval). With whole numbers
    it is the mAP of a data set with as many copies of each image, if no two scores within an image are equal.

    Weights are at least 0, in the order of the images; None is 1 for each image. The value is in [0, 1], or None if no
    image of positive weight has an object.
    """
    per_category = [category.precision(image_weights_I) for category in detections]
    measured = [precision_TR.mean() for precision_TR in per_category if precision_TR is not None]
    return float(np.mean(measured)) if measured else None
