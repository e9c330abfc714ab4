"""cgF1 at each score threshold, and the best threshold, overall and for each category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sam3lora.evaluation.metrics.cgf1 import CgF1, accumulate
from sam3lora.evaluation.metrics.cgf1_units import Units, count_units

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class ThresholdCurve:
    """Metrics at each score threshold, and the best threshold.

    Attributes:
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
        return asdict(self)


@dataclass(frozen=True)
class ThresholdSweep(ThresholdCurve):
    """The curve of all categories together, and the curve of each (`per_category`, by category id)."""

    per_category: dict[int, ThresholdCurve] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; category ids become text."""
        return asdict(self) | {"per_category": {str(id_): curve.to_dict() for id_, curve in self.per_category.items()}}


def sweep_thresholds(units: Units, thresholds: Sequence[float] = THRESHOLDS) -> ThresholdSweep:
    """Measure a split at several score thresholds, over all categories and for each.

    The best threshold is chosen on the split on which it is measured, so its cgF1 is too high: choose it on one split
    and report the result on another.

    No threshold may be below `SCORE_FLOOR`.
    """
    overall: list[CgF1] = []
    of_category: dict[int, list[CgF1]] = defaultdict(list)
    for threshold in thresholds:
        by_category = defaultdict(list)
        for (_, category), counts in count_units(units, threshold).items():
            by_category[category].append(counts)
        overall.append(accumulate(counts for group in by_category.values() for counts in group))
        for category, group in by_category.items():
            of_category[category].append(accumulate(group))
    per_category = {category: ThresholdCurve(**_curve(thresholds, found)) for category, found in of_category.items()}
    return ThresholdSweep(**_curve(thresholds, overall), per_category=per_category)


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
