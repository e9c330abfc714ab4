"""Mask and box mAP by COCO's definition: from a table of matches, or from plain COCO annotations and results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.masks import encode_segmentation
from sam3lora.evaluation.metrics.average_precision import RECALLS_R, CategoryDetections
from sam3lora.evaluation.metrics.matching import (
    BOXES,
    IOU_50,
    IOU_75,
    LARGE_MASKS,
    MASKS,
    MAX_DETECTIONS,
    MEDIUM_MASKS,
    NUM_COMPARISONS,
    NUM_THRESHOLDS,
    SMALL_MASKS,
    MatchTable,
    match_pairs,
)


@dataclass(frozen=True)
class CategoryMap:
    """Averages of one category in [0, 1]; None without objects (crowd regions do not count)."""

    map: float | None
    map_50: float | None
    map_75: float | None
    num_ground_truth: int
    mar_100: float | None = None


@dataclass(frozen=True)
class CocoAverages:
    """COCO's means over the categories that have objects, in [0, 1]; None if no category has any.

    Attributes:
        map, map_50, map_75: Average precision over mask IoU 0.50:0.95, at 0.50 and at 0.75.
        map_small, map_medium, map_large: The same for objects up to 32² px, up to 96² px and above, by mask area at
            the annotated size; None without such objects.
        mar_100: Average recall over mask IoU 0.50:0.95 with at most 100 detections per image and category.
        bbox_map, bbox_map_50: `map` and `map_50` by box IoU; None also if boxes are not evaluated.
    """

    map: float | None
    map_50: float | None
    map_75: float | None
    map_small: float | None
    map_medium: float | None
    map_large: float | None
    mar_100: float | None
    bbox_map: float | None
    bbox_map_50: float | None

    def averages(self) -> dict[str, float | None]:
        return {entry.name: getattr(self, entry.name) for entry in fields(CocoAverages)}


@dataclass(frozen=True)
class MapResult(CocoAverages):
    """COCO's averages with what they were computed from.

    Attributes:
        per_category: Category name -> its averages.
        warnings: Reasons why the values cannot reach 1 on this ground truth.
        table: The matches, so that curves and intervals need not match again.
        precision_KTRC: Precision by comparison, IoU threshold, recall and category; -1 for categories without objects.
    """

    per_category: dict[str, CategoryMap]
    warnings: list[str]
    table: MatchTable = field(repr=False, compare=False)
    precision_KTRC: np.ndarray = field(repr=False, compare=False)


def average_table(table: MatchTable, names: Sequence[str], *, num_queries: int | None = None) -> MapResult:
    """COCO's averages over IoU 0.50:0.95 from the matches; `names` are those of the categories.

    `num_queries` is the number of the model's object queries, for `warnings`.
    """
    shape = (NUM_COMPARISONS, NUM_THRESHOLDS, len(RECALLS_R), len(names))
    precision_KTRC, recall_TC = np.full(shape, -1.0), np.full((NUM_THRESHOLDS, len(names)), -1.0)
    for column in range(len(names)):
        for comparison in range(NUM_COMPARISONS):
            detections = CategoryDetections.of(table, column, comparison)
            precision_TR = detections.precision()
            if precision_TR is None:
                continue
            precision_KTRC[comparison, :, :, column] = precision_TR
            if comparison == MASKS:
                recall_TC[:, column] = detections.recall()
    masks_TRC, boxes_TRC = precision_KTRC[MASKS], precision_KTRC[BOXES]
    num_objects_C = table.num_objects_KIC[MASKS].sum(axis=0)
    per_category = {
        name: CategoryMap(
            map=_mean(masks_TRC[:, :, column]),
            map_50=_mean(masks_TRC[IOU_50, :, column]),
            map_75=_mean(masks_TRC[IOU_75, :, column]),
            num_ground_truth=int(num_objects_C[column]),
            mar_100=_mean(recall_TC[:, column]),
        )
        for column, name in enumerate(names)
    }
    return MapResult(
        map=_mean(masks_TRC),
        map_50=_mean(masks_TRC[IOU_50]),
        map_75=_mean(masks_TRC[IOU_75]),
        map_small=_mean(precision_KTRC[SMALL_MASKS]),
        map_medium=_mean(precision_KTRC[MEDIUM_MASKS]),
        map_large=_mean(precision_KTRC[LARGE_MASKS]),
        mar_100=_mean(recall_TC),
        bbox_map=_mean(boxes_TRC),
        bbox_map_50=_mean(boxes_TRC[IOU_50]),
        per_category=per_category,
        warnings=_warnings(table.num_objects_KIC[MASKS], num_queries),
        table=table,
        precision_KTRC=precision_KTRC,
    )


def coco_map(
    ground_truth: Mapping[str, Any],
    predictions: Iterable[Mapping[str, Any]],
    *,
    bbox: bool = True,
    num_queries: int | None = None,
) -> MapResult:
    """COCO's averages over IoU 0.50:0.95, at most 100 detections per image and category.

    Args:
        ground_truth: COCO: `images` (id, height, width), `annotations` (image_id, category_id, segmentation, iscrowd)
            and `categories` (id, name). Ids may be of any type. Areas are those of the masks, whatever the file says.
            Boxes (xywh) are those of the annotations, or of the masks where there are none. Annotations without a mask
            are left out. A crowd region marked `is_box_only` is an object for boxes.
        predictions: COCO results in any order: image_id, category_id, segmentation (compressed RLE), score, and
            optionally bbox (xywh, else the mask's).
        bbox: Evaluate boxes too.
        num_queries: Number of the model's object queries, for `warnings`.

    Returns:
        Exact averages by pycocotools' definition: https://cocodataset.org/#detection-eval

    Raises:
        ValueError: A prediction names an image or a category that the ground truth lacks, or its mask has another
            size than its image.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    predictions = list(predictions)
    _check(predictions, image_id=sizes, category_id=names)
    rows, columns = ({id_: position for position, id_ in enumerate(ids)} for ids in (sizes, names))
    found = defaultdict(list)
    for prediction in sorted(predictions, key=lambda entry: -entry["score"]):
        pair = (rows[prediction["image_id"]], columns[prediction["category_id"]])
        found[pair].append(prediction)
    annotations = []
    for entry in ground_truth["annotations"]:
        rle = encode_segmentation(entry["segmentation"], sizes[entry["image_id"]])
        if rle is not None:
            region = {"segmentation": rle, "area": float(coco_mask.area(rle)), "bbox": entry.get("bbox")}
            place = {"image": rows[entry["image_id"]], "category": columns[entry["category_id"]]}
            annotations.append(region | place | {key: int(entry.get(key, 0)) for key in ("iscrowd", "is_box_only")})
    table = match_pairs(list(sizes.values()), len(names), annotations, found, boxes=bbox)
    rank_of = {id_: rank for rank, id_ in enumerate(sorted(sizes))}
    ranks_I = np.array([rank_of[id_] for id_ in sizes], np.int64)
    table = MatchTable.join([table], [np.arange(len(sizes))], ranks_I, len(names))
    return average_table(table, list(names.values()), num_queries=num_queries)


def _check(predictions: Iterable[Mapping[str, Any]], **known: Collection[Any]) -> None:
    for prediction in predictions:
        for key, ids in known.items():
            if prediction[key] not in ids:
                raise ValueError(f"a prediction has {key} {prediction[key]!r}, which the ground truth lacks")


def _mean(values: np.ndarray) -> float | None:
    """Mean without the values of -1 by which pycocotools marks categories without objects."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def _warnings(num_objects_IC: np.ndarray, num_queries: int | None) -> list[str]:
    limits = {f"{MAX_DETECTIONS} objects of a category": MAX_DETECTIONS}
    if num_queries is not None:
        limits[f"{num_queries} objects of a category, the model's object queries"] = num_queries
    found = []
    for name, limit in limits.items():
        num_images = int((num_objects_IC > limit).any(axis=1).sum())
        if num_images:
            found.append(
                f"{num_images} image(s) hold more than {name}, up to {num_objects_IC.max()}: recall cannot reach 1"
            )
    return found
