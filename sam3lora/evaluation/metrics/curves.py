"""Curves and histograms of an evaluation for charts, as plain lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from sam3lora.evaluation.metrics.average_precision import CategoryDetections, category_detections
from sam3lora.evaluation.metrics.coco_map import ALL_AREAS, IOU_50, IOU_75

_NUM_BINS = 20
_EDGES = [number / _NUM_BINS for number in range(_NUM_BINS + 1)]


@dataclass(frozen=True)
class PrecisionRecall:
    """Interpolated precision over recall at one IoU threshold.

    Attributes:
        recall: 0, 0.01 ... 1.
        mean: Precision at each recall, averaged over the categories with objects; None if no category has any.
        per_category: Category name -> precision at each recall; categories without objects are left out.
    """

    recall: list[float]
    mean: list[float] | None
    per_category: dict[str, list[float]]


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of scores in 20 bins of equal width over [0, 1].

    Attributes:
        edges: The 21 edges of the bins; a score on an edge belongs to the bin above, 1 to the last.
        right: Counts of matched detections, or of pairs with objects.
        wrong: Counts of unmatched detections, or of pairs without objects.
    """

    edges: list[float]
    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Curves:
    """Curves and histograms of one evaluation.

    Attributes:
        precision_recall_50, precision_recall_75: Curves at mask IoU 0.50 and 0.75.
        detection_scores: Scores of detections that match an object at IoU 0.50, and of those that do not; ignored ones
            are left out.
        best_scores: Best score of each (image, category) pair, 0 without a detection, for pairs with and without
            objects; pairs with only crowd regions are left out.
    """

    precision_recall_50: PrecisionRecall
    precision_recall_75: PrecisionRecall
    detection_scores: ScoreHistogram
    best_scores: ScoreHistogram


def evaluation_curves(evaluation: COCOeval) -> Curves:
    """Curves and histograms of `coco_map(ground_truth, predictions).evaluation`."""
    categories = category_detections(evaluation).values()
    best = [_best_score(category) for category in categories]
    return Curves(
        precision_recall_50=_precision_recall(evaluation, IOU_50),
        precision_recall_75=_precision_recall(evaluation, IOU_75),
        detection_scores=_histogram(
            (category.scores_D[category.is_right_TD[IOU_50]] for category in categories),
            (category.scores_D[category.is_wrong_TD[IOU_50]] for category in categories),
        ),
        best_scores=_histogram(
            (best_I[category.num_objects_I > 0] for category, best_I in zip(categories, best, strict=True)),
            (
                best_I[(category.num_objects_I == 0) & ~category.has_crowd_I]
                for category, best_I in zip(categories, best, strict=True)
            ),
        ),
    )


def _precision_recall(evaluation: COCOeval, threshold: int) -> PrecisionRecall:
    precision_RK = evaluation.eval["precision"][threshold, :, :, ALL_AREAS, -1]
    measured = np.flatnonzero((precision_RK > -1).all(axis=0))
    categories = [evaluation.cocoGt.cats[category]["name"] for category in evaluation.params.catIds]
    return PrecisionRecall(
        recall=evaluation.params.recThrs.tolist(),
        mean=precision_RK[:, measured].mean(axis=1).tolist() if measured.size else None,
        per_category={categories[column]: precision_RK[:, column].tolist() for column in measured},
    )


def _best_score(category: CategoryDetections) -> np.ndarray:
    """Best score per image (I,)."""
    best_I = np.zeros(len(category.num_objects_I))
    np.maximum.at(best_I, category.image_index_D, category.scores_D)
    return best_I


def _histogram(right: Iterable[np.ndarray], wrong: Iterable[np.ndarray]) -> ScoreHistogram:
    counts = (np.histogram(np.concatenate([np.empty(0), *scores]), _EDGES)[0].tolist() for scores in (right, wrong))
    return ScoreHistogram(list(_EDGES), *counts)
