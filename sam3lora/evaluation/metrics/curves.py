"""Curves and histograms of an evaluation for charts, as plain lists, and the threshold of the best cgF1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sam3lora.evaluation.metrics.average_precision import RECALLS_R
from sam3lora.evaluation.metrics.cgf1 import CgF1
from sam3lora.evaluation.metrics.cgf1_units import Units, count_units
from sam3lora.evaluation.metrics.coco_map import MapResult
from sam3lora.evaluation.metrics.matching import IOU_50, IOU_75, MASKS, MatchTable

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
            objects; pairs with only crowd regions, or of which no absence is known, are left out.
    """

    precision_recall_50: PrecisionRecall
    precision_recall_75: PrecisionRecall
    detection_scores: ScoreHistogram
    best_scores: ScoreHistogram


def evaluation_curves(found: MapResult, is_absent_IC: np.ndarray | None = None) -> Curves:
    """Curves and histograms of masks of all sizes.

    `is_absent_IC` are the pairs that are known to be without objects; None takes all pairs without an annotation.
    """
    table = found.table
    right_D, counted_D = _right_and_counted(table, IOU_50)
    best_IC = table.best_score_IC.clip(min=0)
    return Curves(
        precision_recall_50=_precision_recall(found, IOU_50),
        precision_recall_75=_precision_recall(found, IOU_75),
        detection_scores=_histogram(table.score_D[right_D], table.score_D[~right_D & counted_D]),
        best_scores=_histogram(
            best_IC[table.num_objects_KIC[MASKS] > 0],
            best_IC[~table.is_annotated_IC if is_absent_IC is None else is_absent_IC],
        ),
    )


def _right_and_counted(table: MatchTable, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each detection is right, and whether it counts at all, at one of the IoU thresholds."""
    matched_D, ignored_D = (
        (bits_DK[:, MASKS] >> threshold) & 1 > 0 for bits_DK in (table.matched_DK, table.ignored_DK)
    )
    return matched_D & ~ignored_D, ~ignored_D


def _precision_recall(found: MapResult, threshold: int) -> PrecisionRecall:
    precision_RC = found.precision_KTRC[MASKS, threshold]
    measured = np.flatnonzero((precision_RC > -1).all(axis=0))
    names = list(found.per_category)
    return PrecisionRecall(
        recall=RECALLS_R.tolist(),
        mean=precision_RC[:, measured].mean(axis=1).tolist() if measured.size else None,
        per_category={names[column]: precision_RC[:, column].tolist() for column in measured},
    )


def _histogram(right: np.ndarray, wrong: np.ndarray) -> ScoreHistogram:
    return ScoreHistogram(list(_EDGES), *(np.histogram(scores, _EDGES)[0].tolist() for scores in (right, wrong)))


THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class ThresholdCurve:
    """Metrics at each score threshold, and the best threshold.

    Attributes:
        thresholds: The score thresholds.
        cgf1, positive_micro_f1, il_mcc, precision, recall: `CgF1.metrics`, averaged over the IoU thresholds.
        best_threshold: The threshold of the greatest cgF1, of equals the nearest to 0.5. If cgF1 is never above 0, the
            threshold of the greatest positive micro F1; None if that is 0 too.
        best_cgf1: cgF1 at the best threshold; None if cgF1 did not decide.
        reason: Why cgF1 did not decide; None if it did.
    """

    thresholds: list[float]
    cgf1: list[float]
    positive_micro_f1: list[float]
    il_mcc: list[float]
    precision: list[float]
    recall: list[float]
    best_threshold: float | None
    best_cgf1: float | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ThresholdSweep(ThresholdCurve):
    """The curve of all categories together, and the curve of each (`per_category`, by category id)."""

    per_category: dict[int, ThresholdCurve] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; category ids become text."""
        return asdict(self) | {"per_category": {str(id_): curve.to_dict() for id_, curve in self.per_category.items()}}


def sweep_thresholds(
    units: Units, category_ids: Sequence[int], thresholds: Sequence[float] = THRESHOLDS
) -> ThresholdSweep:
    """Measure a split at several score thresholds, over all categories and for each.

    The best threshold is chosen on the split on which it is measured, so its cgF1 is too high: choose it on one split
    and report the result on another.

    Args:
        units: Of the split.
        category_ids: Of the categories of the units.
        thresholds: Score thresholds, none below the units' lowest score.
    """
    counts = [count_units(units, threshold) for threshold in thresholds]
    by_category = zip(*(entry.per_category() for entry in counts), strict=True)
    per_category = {
        id_: ThresholdCurve(**_curve(thresholds, found))
        for id_, found in zip(category_ids, by_category, strict=True)
        if found[0].num_positives + found[0].num_negatives
    }
    return ThresholdSweep(**_curve(thresholds, [entry.overall() for entry in counts]), per_category=per_category)


def _curve(thresholds: Sequence[float], found: Sequence[CgF1]) -> dict[str, Any]:
    metrics = [entry.metrics() for entry in found]
    cgf1, positive_micro_f1 = ([entry[name] for entry in metrics] for name in ("cgF1", "positive_micro_F1"))
    best_threshold, reason = _best(thresholds, cgf1), None
    best_cgf1 = None if best_threshold is None else max(cgf1)
    if best_threshold is None:
        best_threshold = _best(thresholds, positive_micro_f1)
        reason = found[0].undefined_reason or "cgF1 is not above 0 at any threshold"
        if best_threshold is not None:
            reason += ": the threshold is that of the greatest positive micro F1"
    return {
        "thresholds": list(thresholds),
        "cgf1": cgf1,
        "positive_micro_f1": positive_micro_f1,
        "il_mcc": [entry["IL_MCC"] for entry in metrics],
        "precision": [entry["precision"] for entry in metrics],
        "recall": [entry["recall"] for entry in metrics],
        "best_threshold": best_threshold,
        "best_cgf1": best_cgf1,
        "reason": reason,
    }


def _best(thresholds: Sequence[float], values: Sequence[float]) -> float | None:
    """The threshold of the greatest value, of equals the nearest to 0.5; None if no value is above 0."""
    if max(values) <= 0:
        return None
    return max(zip(values, thresholds), key=lambda pair: (pair[0], -round(abs(pair[1] - 0.5), 6)))[1]
