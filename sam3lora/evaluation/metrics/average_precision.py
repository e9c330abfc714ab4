"""Average precision for given image weights, from the matches of a pycocotools evaluation.

Shape legend: `T` IoU thresholds, `D` detections of a category, `N` of them that are right, `I` images, `R` recalls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pycocotools.cocoeval import COCOeval

from sam3lora.evaluation.metrics.coco_map import ALL_AREAS

RECALLS_R = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class CategoryDetections:
    """Detections of one category over all images, best score first, ties in the order of the images.

    Attributes:
        image_index_D: Position of the image in the evaluation's sorted image ids.
        is_matched_TD: Whether it is matched to an object, or to a crowd region (then it is ignored too).
        is_ignored_TD: Whether it counts as neither right nor wrong.
        num_objects_I: Number of objects in each image, without crowd regions.
    """

    scores_D: np.ndarray
    image_index_D: np.ndarray
    is_matched_TD: np.ndarray
    is_ignored_TD: np.ndarray
    num_objects_I: np.ndarray
    has_crowd_I: np.ndarray

    @cached_property
    def is_right_TD(self) -> np.ndarray:
        return self.is_matched_TD & ~self.is_ignored_TD

    @cached_property
    def is_wrong_TD(self) -> np.ndarray:
        return ~self.is_matched_TD & ~self.is_ignored_TD

    @cached_property
    def _counted_CD(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows of "the detection counts" (a single one without crowds), and the row of each threshold."""
        return np.unique(~self.is_ignored_TD, axis=0, return_inverse=True)

    @cached_property
    def _right_at_TN(self) -> list[np.ndarray]:
        return [np.flatnonzero(row) for row in self.is_right_TD]

    def average_precision(self, image_weights_I: np.ndarray) -> np.ndarray | None:
        """Average precision (T,) at each IoU threshold, in [0, 1]; None if no object has a weight.

        Precision is computed at right detections only, where recall rises: it falls everywhere else, and the
        interpolation takes the best precision at a recall or above.
        """
        num_objects = image_weights_I @ self.num_objects_I
        if num_objects == 0:
            return None
        weights_D = image_weights_I[self.image_index_D]
        counted_CD, row_T = self._counted_CD
        num_counted_CD = np.cumsum(counted_CD * weights_D, axis=1)
        found_T = np.zeros(len(row_T))
        for threshold, right_N in enumerate(self._right_at_TN):
            num_right_N = np.cumsum(weights_D[right_N])
            precision_N = num_right_N / (num_counted_CD[row_T[threshold], right_N] + np.spacing(1))
            # Precision is 0 at recalls that are never reached.
            best_N = np.append(np.maximum.accumulate(precision_N[::-1])[::-1], 0)
            found_T[threshold] = best_N[np.searchsorted(num_right_N / num_objects, RECALLS_R)].mean()
        return found_T


def category_detections(evaluation: COCOeval) -> dict[int, CategoryDetections]:
    """The matches of an evaluated `COCOeval` by category id, over objects of all sizes and all images."""
    params = evaluation.params
    num_images, num_areas = len(params.imgIds), len(params.areaRng)
    position = {image: index for index, image in enumerate(params.imgIds)}
    found = {}
    for column, category in enumerate(params.catIds):
        start = (column * num_areas + ALL_AREAS) * num_images
        units = [unit for unit in evaluation.evalImgs[start : start + num_images] if unit is not None]
        found[category] = _join(units, position, len(params.iouThrs))
    return found


def average_precision(
    detections: Iterable[CategoryDetections], image_weights_I: np.ndarray | None = None
) -> float | None:
    """mAP with each image counted as often as its weight: the mean over thresholds and categories with objects.

    With weights of 1 it is pycocotools' mAP (101 recalls, https://cocodataset.org/#detection-eval). With whole numbers
    it is the mAP of a data set with as many copies of each image, if no two scores within an image are equal.

    Weights are at least 0, in the order of sorted image ids; None is 1 for each image. The value is in [0, 1], or None
    if no image of positive weight has an object.
    """
    per_category = []
    for category in detections:
        weights_I = np.ones(len(category.num_objects_I), dtype=int) if image_weights_I is None else image_weights_I
        per_category.append(category.average_precision(weights_I))
    measured = [value_T for value_T in per_category if value_T is not None]
    return float(np.mean(measured)) if measured else None


def _join(units: list[dict], position: dict, num_thresholds: int) -> CategoryDetections:
    """Join a category's images, in the order of pycocotools."""
    num_objects_I = np.zeros(len(position), dtype=int)
    has_crowd_I = np.zeros(len(position), dtype=bool)
    scores, image_indices = [np.empty(0)], [np.empty(0, dtype=int)]
    matched = [np.empty((num_thresholds, 0), dtype=bool)]
    ignored = [np.empty((num_thresholds, 0), dtype=bool)]
    for unit in units:
        index = position[unit["image_id"]]
        num_objects_I[index] = np.count_nonzero(unit["gtIgnore"] == 0)
        has_crowd_I[index] = num_objects_I[index] < len(unit["gtIgnore"])
        scores.append(np.asarray(unit["dtScores"], dtype=float))
        image_indices.append(np.full(len(unit["dtScores"]), index))
        matched.append(unit["dtMatches"] > 0)
        ignored.append(unit["dtIgnore"].astype(bool))
    scores_D = np.concatenate(scores)
    order = np.argsort(-scores_D, kind="stable")
    return CategoryDetections(
        scores_D=scores_D[order],
        image_index_D=np.concatenate(image_indices)[order],
        is_matched_TD=np.concatenate(matched, axis=1)[:, order],
        is_ignored_TD=np.concatenate(ignored, axis=1)[:, order],
        num_objects_I=num_objects_I,
        has_crowd_I=has_crowd_I,
    )
