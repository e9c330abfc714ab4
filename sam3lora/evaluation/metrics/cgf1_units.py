"""The units of cgF1 on an evaluated split: one for every category in every image.

Most units have neither targets nor detections, so only the others are listed.

Shapes: `I` images, `C` categories, `P` units with targets, `D` detections of units without, `U` units with targets or
detections, `K` the ten IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sam3lora.config.evaluation import LOWEST_THRESHOLD
from sam3lora.evaluation.metrics.cgf1 import (
    IOU_THRESHOLDS,
    SCORE_THRESHOLD,
    CgF1,
    IouType,
    Unit,
    count_unit,
    iou_matrix,
    unit_f1,
)

REGION_KEY = {"segm": "segmentation", "bbox": "bbox"}


@dataclass(frozen=True)
class Units:
    """The units of a split, with detections down to a score.

    Attributes:
        positives: Units with targets, detections by descending score.
        pairs_P2: (image, category) of each as positions.
        alarm_pairs_D2, alarm_scores_D: Detections of units without targets.
        is_negative_IC: Pairs that are units without targets.
        lowest_score: Detections below it are left out.
    """

    positives: list[Unit]
    pairs_P2: np.ndarray
    alarm_pairs_D2: np.ndarray
    alarm_scores_D: np.ndarray
    is_negative_IC: np.ndarray
    lowest_score: float = LOWEST_THRESHOLD

    @classmethod
    def join(cls, parts: Sequence[Units], rows: Sequence[np.ndarray], num_images: int, num_categories: int) -> Units:
        """One of all; `rows` are, for each part, the positions of its images among all images."""
        is_negative_IC = np.zeros((num_images, num_categories), bool)
        for part, rows_I in zip(parts, rows, strict=True):
            is_negative_IC[rows_I] = part.is_negative_IC
        return cls(
            [unit for part in parts for unit in part.positives],
            _join_pairs([part.pairs_P2 for part in parts], rows),
            _join_pairs([part.alarm_pairs_D2 for part in parts], rows),
            np.concatenate([np.empty(0), *(part.alarm_scores_D for part in parts)]),
            is_negative_IC,
            max((part.lowest_score for part in parts), default=LOWEST_THRESHOLD),
        )

    def without(self, categories: Sequence[int]) -> Units:
        """The units of the other categories, by positions."""
        kept_P = ~np.isin(self.pairs_P2[:, 1], categories)
        kept_D = ~np.isin(self.alarm_pairs_D2[:, 1], categories)
        is_negative_IC = self.is_negative_IC.copy()
        is_negative_IC[:, list(categories)] = False
        return replace(
            self,
            positives=[unit for unit, kept in zip(self.positives, kept_P.tolist(), strict=True) if kept],
            pairs_P2=self.pairs_P2[kept_P],
            alarm_pairs_D2=self.alarm_pairs_D2[kept_D],
            alarm_scores_D=self.alarm_scores_D[kept_D],
            is_negative_IC=is_negative_IC,
        )

    def of(self, image: int, category: int) -> Unit:
        """One unit, by positions; KeyError for a pair that is not judged."""
        at = np.flatnonzero((self.pairs_P2 == (image, category)).all(axis=1))
        if at.size:
            return self.positives[at[0]]
        if not self.is_negative_IC[image, category]:
            raise KeyError((image, category))
        scores = self.alarm_scores_D[(self.alarm_pairs_D2 == (image, category)).all(axis=1)]
        return Unit(np.zeros((len(scores), 0)), scores)


def _join_pairs(pairs: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    moved = [np.column_stack([rows_I[of[:, 0]], of[:, 1]]) for of, rows_I in zip(pairs, rows, strict=True) if len(of)]
    return np.concatenate(moved).astype(np.int32) if moved else np.empty((0, 2), np.int32)


def collect_units(
    annotations: Sequence[Mapping[str, Any]],
    detections: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]],
    shape_IC: tuple[int, int],
    *,
    iou_type: IouType = "segm",
    lowest_score: float = LOWEST_THRESHOLD,
) -> Units:
    """Units of some images: every category in every image, whether the image shows it or not.

    Crowd regions are not targets, and a detection in one is still a false positive. A category of which an image has
    only crowd regions, or an object without a mask, cannot be judged there and has no unit.

    Args:
        annotations: As of `match_pairs`.
        detections: (image, category) as positions -> COCO results by descending score.
        shape_IC: Numbers of images and of categories.
        lowest_score: Detections below it are left out; no threshold may be lower.
    """
    region_key = REGION_KEY[iou_type]
    is_negative_IC = np.ones(shape_IC, bool)
    targets: dict[tuple[int, int], list[Any]] = {}
    unclear = set()
    for annotation in annotations:
        pair = (annotation["image"], annotation["category"])
        is_negative_IC[pair] = False
        if not annotation["iscrowd"]:
            targets.setdefault(pair, []).append(annotation[region_key])
        elif annotation.get("is_box_only"):
            unclear.add(pair)
    positives = {
        pair: make_unit([d for d in detections.get(pair, ()) if d["score"] >= lowest_score], regions, iou_type)
        for pair, regions in targets.items()
        if pair not in unclear
    }
    alarms = [
        (pair, detection["score"])
        for pair, of_pair in detections.items()
        if is_negative_IC[pair]
        for detection in of_pair
        if detection["score"] >= lowest_score
    ]
    return Units(
        list(positives.values()),
        np.array(list(positives), np.int32).reshape(-1, 2),
        np.array([pair for pair, _ in alarms], np.int32).reshape(-1, 2),
        np.array([score for _, score in alarms], float),
        is_negative_IC,
        lowest_score,
    )


def make_unit(detections: Sequence[Mapping[str, Any]], targets: Sequence[Any], iou_type: IouType) -> Unit:
    """One unit from COCO results and the targets' masks or boxes."""
    regions = [entry[REGION_KEY[iou_type]] for entry in detections]
    return Unit(iou_matrix(regions, targets, iou_type), np.array([entry["score"] for entry in detections], dtype=float))


@dataclass(frozen=True)
class SplitCounts:
    """Counts of the units with targets or detections at a score threshold; all other units are right.

    Attributes:
        pairs_U2: (image, category) as positions.
        num_targets_U, num_detections_U: Targets, and detections at or above the threshold.
        true_positives_UK: Detections matched to a target.
        is_negative_IC: Pairs that are units without targets, listed or not.
    """

    pairs_U2: np.ndarray
    num_targets_U: np.ndarray
    num_detections_U: np.ndarray
    true_positives_UK: np.ndarray
    is_negative_IC: np.ndarray

    def sums(self, axis: int) -> dict[str, np.ndarray]:
        """Fields of `CgF1` -> sums for each image (axis 0) or each category (axis 1)."""
        group_U, size = self.pairs_U2[:, axis], self.is_negative_IC.shape[axis]
        targets_U1, detections_U1 = self.num_targets_U[:, None], self.num_detections_U[:, None]
        false_positives_UK = detections_U1 - self.true_positives_UK
        positive_U, detected_U = self.num_targets_U > 0, self.num_detections_U > 0
        f1_UK = unit_f1(self.true_positives_UK, detections_U1, targets_U1)

        def total(values_U: np.ndarray, chosen_U: np.ndarray | slice = slice(None)) -> np.ndarray:
            sums = np.zeros((size, *values_U.shape[1:]), values_U.dtype)
            np.add.at(sums, group_U[chosen_U], values_U[chosen_U])
            return sums

        num_false_alarms = total((~positive_U & detected_U).astype(np.int64))
        return {
            "true_positives_K": total(self.true_positives_UK),
            "false_positives_K": total(false_positives_UK),
            "false_negatives_K": total(targets_U1 - self.true_positives_UK),
            "positive_false_positives_K": total(false_positives_UK, positive_U),
            "positive_f1_sum_K": total(f1_UK, positive_U),
            "num_detected_positives": total((positive_U & detected_U).astype(np.int64)),
            "num_false_alarms": num_false_alarms,
            "num_true_negatives": self.is_negative_IC.sum(axis=1 - axis) - num_false_alarms,
            "num_missed_positives": total((positive_U & ~detected_U).astype(np.int64)),
        }

    def per_category(self) -> list[CgF1]:
        sums = self.sums(axis=1)
        return [
            CgF1(**{name: values[column] for name, values in sums.items()})
            for column in range(self.is_negative_IC.shape[1])
        ]

    def overall(self) -> CgF1:
        return CgF1(**{name: values.sum(axis=0) for name, values in self.sums(axis=1).items()})


def count_units(units: Units, score_threshold: float | np.ndarray = SCORE_THRESHOLD) -> SplitCounts:
    """Counts at a score threshold, or at one for each category (C,); ValueError below the lowest score of the units."""
    threshold_C = np.broadcast_to(score_threshold, units.is_negative_IC.shape[1:])
    if (threshold_C < units.lowest_score).any():
        raise ValueError(f"the score threshold must be at least {units.lowest_score}, got {threshold_C.min()}")
    counts = [
        count_unit(unit, threshold_C[category])
        for unit, category in zip(units.positives, units.pairs_P2[:, 1], strict=True)
    ]
    heard_D = units.alarm_scores_D >= threshold_C[units.alarm_pairs_D2[:, 1]]
    alarm_pairs, num_alarms = np.unique(units.alarm_pairs_D2[heard_D], axis=0, return_counts=True)
    zeros = np.zeros(len(alarm_pairs), np.int64)
    found_PK = np.array([entry.true_positives_K for entry in counts], np.int64).reshape(-1, len(IOU_THRESHOLDS))
    return SplitCounts(
        np.concatenate([units.pairs_P2, alarm_pairs]),
        np.concatenate([np.array([entry.num_targets for entry in counts], np.int64), zeros]),
        np.concatenate([np.array([entry.num_detections for entry in counts], np.int64), num_alarms]),
        np.concatenate([found_PK, np.zeros((len(alarm_pairs), len(IOU_THRESHOLDS)), np.int64)]),
        units.is_negative_IC,
    )
