"""The units of cgF1 on an evaluated split: one for every category in every image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.cgf1 import (
    SCORE_THRESHOLD,
    IouType,
    Unit,
    UnitCounts,
    count_unit,
    iou_matrix,
)
from sam3lora.evaluation.metrics.ground_truth import PresenceTable

SCORE_FLOOR = 0.05  # split_units drops detections below it; no useful threshold is lower

Units = dict[tuple[int, int], Unit]

REGION_KEY = {"segm": "segmentation", "bbox": "bbox"}


def split_units(
    ground_truth: Mapping[str, Any],
    predictions: Iterable[Mapping[str, Any]],
    presence: PresenceTable,
    iou_type: IouType = "segm",
    lowest_score: float = SCORE_FLOOR,
) -> Units:
    """Units of an evaluated split: every category in every image, whether the image shows it or not.

    Crowd regions are not targets, and a detection in one is still a false positive. A category of which an image has
    only crowd regions, or an object without a mask, cannot be judged there and has no unit.

    Ground truth and presence are those of `build_ground_truth`, predictions COCO results at the annotated size.
    Detections below `lowest_score` are dropped; no threshold may be lower.

    Returns:
        (image id, category id) -> unit, with detections by descending score.

    Raises:
        UserError: A prediction names an image or a category that the ground truth lacks.
    """
    region_key = REGION_KEY[iou_type]
    image_ids, category_ids = ([entry["id"] for entry in ground_truth[key]] for key in ("images", "categories"))
    targets: dict[tuple[int, int], list[Any]] = {(i, c): [] for i in image_ids for c in category_ids}
    detections: dict[tuple[int, int], list[Mapping[str, Any]]] = {pair: [] for pair in targets}
    for annotation in ground_truth["annotations"]:
        if not annotation["iscrowd"]:
            targets[annotation["image_id"], annotation["category_id"]].append(annotation[region_key])
    for prediction in sorted(predictions, key=lambda entry: -entry["score"]):
        pair = (prediction["image_id"], prediction["category_id"])
        if pair not in detections:
            raise UserError(
                f"a prediction has image_id {pair[0]!r} and category_id {pair[1]!r}, which the ground truth lacks: "
                "it belongs to another split"
            )
        if prediction["score"] >= lowest_score:
            detections[pair].append(prediction)
    unclear = {(a["image_id"], a["category_id"]) for a in ground_truth["annotations"] if a.get("is_box_only")}
    return {
        pair: make_unit(detections[pair], regions, iou_type)
        for pair, regions in targets.items()
        if (regions or pair not in presence) and pair not in unclear
    }


def count_units(units: Units, score_threshold: float = SCORE_THRESHOLD) -> dict[tuple[int, int], UnitCounts]:
    """Counts of each unit at a score threshold; ValueError below `SCORE_FLOOR`, where detections are missing."""
    if score_threshold < SCORE_FLOOR:
        raise ValueError(f"the score threshold must be at least {SCORE_FLOOR}, got {score_threshold}")
    return {pair: count_unit(unit, score_threshold) for pair, unit in units.items()}


def make_unit(detections: Sequence[Mapping[str, Any]], targets: Sequence[Any], iou_type: IouType) -> Unit:
    """One unit from COCO results and the targets' masks or boxes."""
    regions = [entry[REGION_KEY[iou_type]] for entry in detections]
    return Unit(iou_matrix(regions, targets, iou_type), np.array([entry["score"] for entry in detections], dtype=float))
