"""cgF1, SAM 3's metric of open-vocabulary segmentation, as its evaluator counts it.

A unit is a pair of an image and a phrase. The objects that the phrase names are its targets; a negative unit has none.
Classification-gated F1 is cgF1 = positive micro F1 x IL_MCC (https://arxiv.org/abs/2511.16719). The first factor says
how well objects are outlined in units that have some, the second how well the model tells positive from negative units.

Shapes: `D` detections and `T` targets of a unit, `U` units, `K` the ten IoU thresholds 0.50, 0.55 ... 0.95.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

IouType = Literal["segm", "bbox"]

SCORE_THRESHOLD = 0.5
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_NAMED_IOU = {"@0.5": 0, "@0.75": 5}  # suffix of a metric's name -> position in the thresholds

# SAM 3's own constants. They keep a ratio without any count defined, and change the numbers slightly.
_BOX_EPS = 1e-4
_IMAGE_LEVEL_EPS = 1e-6


@dataclass(frozen=True)
class Unit:
    """The detections and targets of one (image, phrase) pair, with the IoU of their masks or boxes."""

    iou_DT: np.ndarray
    scores_D: np.ndarray


@dataclass(frozen=True)
class UnitCounts:
    """Counts of a unit at one score threshold.

    Attributes:
        num_targets, num_detections: Targets, and detections at or above the score threshold.
        true_positives_K: Detections matched to a target, for each IoU threshold.
    """

    num_targets: int
    num_detections: int
    true_positives_K: np.ndarray

    @property
    def mean_f1(self) -> float:
        """F1 of this unit alone, averaged over the IoU thresholds."""
        return float(unit_f1(self.true_positives_K, self.num_detections, self.num_targets).mean())


@dataclass(frozen=True)
class CgF1:
    """Counts over all units, from which every metric follows.

    Attributes:
        true_positives_K, false_positives_K, false_negatives_K: Detections, or targets, of all units.
        positive_false_positives_K: False positives in units that have targets.
        positive_f1_sum_K: Sum of the F1 of each unit that has targets.
        num_detected_positives: Units with targets and detections: IL_TP.
        num_false_alarms: Units with detections and no target: IL_FP.
        num_true_negatives: Units with neither: IL_TN.
        num_missed_positives: Units with targets and no detection: IL_FN.
    """

    true_positives_K: np.ndarray
    false_positives_K: np.ndarray
    false_negatives_K: np.ndarray
    positive_false_positives_K: np.ndarray
    positive_f1_sum_K: np.ndarray
    num_detected_positives: int
    num_false_alarms: int
    num_true_negatives: int
    num_missed_positives: int

    @property
    def num_positives(self) -> int:
        """Units with targets."""
        return self.num_detected_positives + self.num_missed_positives

    @property
    def num_negatives(self) -> int:
        """Units without targets."""
        return self.num_false_alarms + self.num_true_negatives

    @property
    def undefined_reason(self) -> str | None:
        """Why cgF1 is 0 whatever the model does; None if cgF1 is meaningful."""
        if not self.num_positives:
            return "no prompt has an object to find in any image"
        if not self.num_negatives:
            return "no prompt is absent from any image, and cgF1 needs such negatives"
        return None

    def metrics(self) -> dict[str, float]:
        """The evaluator's metrics as fractions.

        Names without suffix are averages over the ten IoU thresholds; `@0.5` and `@0.75` are of one threshold. `IL_`
        stands for image level: a unit is right if it has detections exactly when it has targets. All values lie in
        [0, 1], except IL_MCC and cgF1 in [-1, 1] and `positive_macro_F1`, which is -1 if no positive unit has a
        detection.
        """
        # Python integers: the product of four sums would overflow NumPy's on large sets.
        found, missed = int(self.num_detected_positives), int(self.num_missed_positives)
        false_alarms, quiet = int(self.num_false_alarms), int(self.num_true_negatives)
        il_precision = found / (found + false_alarms + _IMAGE_LEVEL_EPS)
        il_recall = found / (found + missed + _IMAGE_LEVEL_EPS)
        margins = (found + false_alarms) * (found + missed) * (quiet + false_alarms) * (quiet + missed)
        il_mcc = (found * quiet - false_alarms * missed) / (math.sqrt(margins) + _IMAGE_LEVEL_EPS)

        precision_K = _ratio(self.true_positives_K, self.false_positives_K)
        positive_precision_K = _ratio(self.true_positives_K, self.positive_false_positives_K)
        recall_K = _ratio(self.true_positives_K, self.false_negatives_K)
        positive_micro_f1_K = _harmonic(positive_precision_K, recall_K)
        macro_f1_K = self.positive_f1_sum_K / found if found else np.full(len(IOU_THRESHOLDS), -1.0)
        by_iou = {
            "cgF1": positive_micro_f1_K * il_mcc,
            "precision": precision_K,
            "recall": recall_K,
            "F1": _harmonic(precision_K, recall_K),
            "positive_macro_F1": macro_f1_K,
            "positive_micro_F1": positive_micro_f1_K,
            "positive_micro_precision": positive_precision_K,
        }
        return {
            **{name: float(values_K.mean()) for name, values_K in by_iou.items()},
            **{
                name + suffix: float(values_K[position])
                for suffix, position in _NAMED_IOU.items()
                for name, values_K in by_iou.items()
            },
            "IL_precision": il_precision,
            "IL_recall": il_recall,
            "IL_F1": 2 * il_precision * il_recall / (il_precision + il_recall + _IMAGE_LEVEL_EPS),
            "IL_FPR": false_alarms / (false_alarms + quiet + _IMAGE_LEVEL_EPS),
            "IL_MCC": il_mcc,
        }

    def counts(self) -> dict[str, Any]:
        """The counts behind the metrics: lists over the IoU thresholds, and numbers of units."""
        return {
            "TPs": self.true_positives_K.tolist(),
            "FPs": self.false_positives_K.tolist(),
            "positive_micro_FPs": self.positive_false_positives_K.tolist(),
            "FNs": self.false_negatives_K.tolist(),
            "IL_TP": self.num_detected_positives,
            "IL_FP": self.num_false_alarms,
            "IL_TN": self.num_true_negatives,
            "IL_FN": self.num_missed_positives,
            "units_evaluated": self.num_positives + self.num_negatives,
        }


def iou_matrix(detections: Sequence[Any], targets: Sequence[Any], iou_type: IouType) -> np.ndarray:
    """IoU (D, T) of compressed RLEs ("segm") or of xywh boxes in pixels or as fractions of the image ("bbox")."""
    if not detections or not targets:
        return np.zeros((len(detections), len(targets)))
    is_crowd = [0] * len(targets)
    if iou_type == "bbox":
        return np.asarray(coco_mask.iou(np.array(detections, dtype=float), np.array(targets, dtype=float), is_crowd))
    return np.asarray(coco_mask.iou(detections, targets, is_crowd))


def count_unit(unit: Unit, score_threshold: float = SCORE_THRESHOLD) -> UnitCounts:
    """Match detections to targets one to one with the greatest sum of IoUs (Hungarian), whatever their scores."""
    iou_DT = unit.iou_DT[unit.scores_D >= score_threshold]
    matched_iou = iou_DT[linear_sum_assignment(iou_DT, maximize=True)]
    return UnitCounts(iou_DT.shape[1], iou_DT.shape[0], (matched_iou[:, None] >= IOU_THRESHOLDS).sum(axis=0))


def choose_annotator(counts: Sequence[UnitCounts]) -> UnitCounts:
    """The counts of a unit with the annotator who agrees best with the detections (the evaluator's "oracle").

    An annotator without targets is chosen if there are no detections either; otherwise the annotator with the greatest
    mean F1, the earlier one of equals. There must be counts of at least one annotator.
    """
    agreed = (entry for entry in counts if entry.num_targets == entry.num_detections == 0)
    return next(agreed, None) or max(counts, key=lambda entry: entry.mean_f1)


def accumulate(counts: Iterable[UnitCounts]) -> CgF1:
    """Sum over units; zeros without any."""
    counts = list(counts)
    targets_U = np.array([entry.num_targets for entry in counts], dtype=np.int64)
    detections_U = np.array([entry.num_detections for entry in counts], dtype=np.int64)
    true_positives_UK = np.array([entry.true_positives_K for entry in counts], dtype=np.int64)
    true_positives_UK = true_positives_UK.reshape(len(counts), len(IOU_THRESHOLDS))
    false_positives_UK = detections_U[:, None] - true_positives_UK
    positive_U, detected_U = targets_U > 0, detections_U > 0
    f1_UK = unit_f1(true_positives_UK, detections_U[:, None], targets_U[:, None])
    return CgF1(
        true_positives_K=true_positives_UK.sum(axis=0),
        false_positives_K=false_positives_UK.sum(axis=0),
        false_negatives_K=(targets_U[:, None] - true_positives_UK).sum(axis=0),
        positive_false_positives_K=false_positives_UK[positive_U].sum(axis=0),
        positive_f1_sum_K=f1_UK[positive_U].sum(axis=0),
        num_detected_positives=int((positive_U & detected_U).sum()),
        num_false_alarms=int((~positive_U & detected_U).sum()),
        num_true_negatives=int((~positive_U & ~detected_U).sum()),
        num_missed_positives=int((positive_U & ~detected_U).sum()),
    )


def unit_f1(true_positives: np.ndarray, detections: np.ndarray | int, targets: np.ndarray | int) -> np.ndarray:
    """F1 of each unit, with the evaluator's constant in both ratios."""
    return _harmonic(true_positives / (detections + _BOX_EPS), true_positives / (targets + _BOX_EPS))


def _ratio(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    return right / (right + wrong + _BOX_EPS)


def _harmonic(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + _BOX_EPS)
