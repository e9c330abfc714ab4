"""Mask mAP as pycocotools computes it, from plain lists of COCO annotations and results."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lora.data.masks import encode_segmentation

MAX_DETECTIONS = 100
_IOU_50, _IOU_75 = 0, 5  # positions in the thresholds 0.50, 0.55 ... 0.95
_ALL_AREAS, _MAX_100 = 0, 2


@dataclass(frozen=True)
class CategoryMap:
    """Average precision of one category in [0, 1], None without any object to find (crowd regions do not count)."""

    map: float | None
    map_50: float | None
    map_75: float | None
    num_ground_truth: int


@dataclass(frozen=True)
class MapResult:
    """Means over the categories that have objects, in [0, 1]; None when none has."""

    map: float | None
    map_50: float | None
    map_75: float | None
    per_category: dict[str, CategoryMap]


def coco_map(ground_truth: Mapping[str, Any], predictions: Iterable[Mapping[str, Any]]) -> MapResult:
    """Segmentation mAP over IoU 0.50:0.95, at most 100 detections per image and category, all object sizes.

    Args:
        ground_truth: COCO: `images` (id, height, width), `annotations` (image_id, category_id, segmentation, iscrowd)
            and `categories` (id, name). Ids of any kind. Areas are taken from the masks, whatever the file says.
        predictions: COCO results: image_id, category_id, segmentation (compressed RLE), score. Any number, any order.

    Returns:
        Exact averages, in pycocotools' definition: https://cocodataset.org/#detection-eval

    Raises:
        ValueError: A prediction names an image or a category that the ground truth lacks.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    predictions = list(predictions)
    for key, known in (("image_id", sizes), ("category_id", names)):
        unknown = next((p[key] for p in predictions if p[key] not in known), None)
        if unknown is not None:
            raise ValueError(f"a prediction has {key} {unknown!r}, which the ground truth lacks")
    truth = _as_coco(sizes, names, ground_truth["annotations"])
    found = _as_coco(sizes, names, predictions, is_compressed=True)
    counts = dict.fromkeys(names, 0)
    for annotation in truth.dataset["annotations"]:
        counts[annotation["category_id"]] += not annotation["iscrowd"]

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, "segm")
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    # thresholds x recalls x categories
    precision = evaluation.eval["precision"][:, :, :, _ALL_AREAS, _MAX_100]
    per_category = {
        names[category]: CategoryMap(
            _mean(precision[:, :, column]),
            _mean(precision[_IOU_50, :, column]),
            _mean(precision[_IOU_75, :, column]),
            counts[category],
        )
        for column, category in enumerate(evaluation.params.catIds)
    }
    return MapResult(_mean(precision), _mean(precision[_IOU_50]), _mean(precision[_IOU_75]), per_category)


def _as_coco(
    sizes: Mapping[Any, tuple[int, int]],
    names: Mapping[Any, str],
    annotations: Sequence[Mapping[str, Any]],
    *,
    is_compressed: bool = False,
) -> COCO:
    """An indexed `COCO` with ids from 1: pycocotools takes a match with annotation id 0 for no match."""
    entries = []
    for number, annotation in enumerate(annotations, start=1):
        rle = annotation["segmentation"]
        if not is_compressed:
            rle = encode_segmentation(rle, sizes[annotation["image_id"]])
        if not rle:
            continue
        entries.append(
            {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": rle,
                "area": float(coco_mask.area(rle)),
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "score": float(annotation.get("score", 1.0)),
            }
        )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
        "annotations": entries,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float | None:
    """pycocotools marks categories without objects by -1."""
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
