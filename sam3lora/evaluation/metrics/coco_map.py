"""Mask and box mAP by pycocotools, from plain COCO annotations and results."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lora.data.masks import encode_segmentation

MAX_DETECTIONS = 100
IOU_50, IOU_75 = 0, 5  # positions in the thresholds 0.50, 0.55 ... 0.95
ALL_AREAS, _SMALL, _MEDIUM, _LARGE = range(4)


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
        evaluation: The accumulated mask evaluation, so that curves and intervals need not match again. Its arrays of
            precision have the axes (IoU, recall, category, size, 1), with the sizes all, small, medium and large.
    """

    per_category: dict[str, CategoryMap]
    warnings: list[str]
    evaluation: COCOeval = field(repr=False, compare=False)


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
    _check(predictions, sizes, names)
    masks = [encode_segmentation(a["segmentation"], sizes[a["image_id"]]) for a in ground_truth["annotations"]]
    truth = _as_coco(sizes, names, ground_truth["annotations"], masks)
    found = _as_coco(sizes, names, predictions, [prediction["segmentation"] for prediction in predictions])
    num_objects = Counter(
        (entry["image_id"], entry["category_id"]) for entry in truth.dataset["annotations"] if not entry["iscrowd"]
    )

    evaluation = _evaluate(truth, found, "segm")
    precision = evaluation.eval["precision"][:, :, :, :, 0]
    recall = evaluation.eval["recall"][:, :, ALL_AREAS, 0]
    over_all = precision[:, :, :, ALL_AREAS]
    with_boxes = [a | {"iscrowd": 0} if a.get("is_box_only") else a for a in ground_truth["annotations"]]
    boxes = np.empty((10, 0))
    if bbox:
        boxes = _evaluate(_as_coco(sizes, names, with_boxes, masks), found, "bbox").eval["precision"]
    per_category = {
        names[category]: CategoryMap(
            map=_mean(over_all[:, :, column]),
            map_50=_mean(over_all[IOU_50, :, column]),
            map_75=_mean(over_all[IOU_75, :, column]),
            num_ground_truth=sum(num for (_, of), num in num_objects.items() if of == category),
            mar_100=_mean(recall[:, column]),
        )
        for column, category in enumerate(evaluation.params.catIds)
    }
    return MapResult(
        map=_mean(over_all),
        map_50=_mean(over_all[IOU_50]),
        map_75=_mean(over_all[IOU_75]),
        map_small=_mean(precision[:, :, :, _SMALL]),
        map_medium=_mean(precision[:, :, :, _MEDIUM]),
        map_large=_mean(precision[:, :, :, _LARGE]),
        mar_100=_mean(recall),
        bbox_map=_mean(boxes),
        bbox_map_50=_mean(boxes[IOU_50]),
        per_category=per_category,
        warnings=_warnings(num_objects, num_queries),
        evaluation=evaluation,
    )


class _Evaluation(COCOeval):
    """Skips the masks of (image, category) pairs without objects, which most pairs are."""

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        return super().computeIoU(imgId, catId) if self._gts[imgId, catId] else []


def _evaluate(truth: COCO, found: COCO, iou_type: Literal["segm", "bbox"]) -> COCOeval:
    evaluation = _Evaluation(truth, found, iou_type)
    evaluation.params.maxDets = [MAX_DETECTIONS]
    if iou_type == "bbox":
        evaluation.params.areaRng = evaluation.params.areaRng[: ALL_AREAS + 1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[: ALL_AREAS + 1]
        for entry in truth.dataset["annotations"] + found.dataset["annotations"]:
            entry["bbox"] = entry["bbox"] or coco_mask.toBbox(entry["segmentation"]).tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _check(
    predictions: Sequence[Mapping[str, Any]], sizes: Mapping[Any, tuple[int, int]], names: Mapping[Any, str]
) -> None:
    for prediction in predictions:
        for key, known in (("image_id", sizes), ("category_id", names)):
            if prediction[key] not in known:
                raise ValueError(f"a prediction has {key} {prediction[key]!r}, which the ground truth lacks")
        size, expected = tuple(prediction["segmentation"]["size"]), sizes[prediction["image_id"]]
        if size != expected:
            raise ValueError(
                f"a prediction of image {prediction['image_id']!r} has a mask of (height, width) {size}, "
                f"expected the image's size {expected}"
            )


def _as_coco(
    sizes: Mapping[Any, tuple[int, int]],
    names: Mapping[Any, str],
    annotations: Sequence[Mapping[str, Any]],
    masks: Sequence[dict[str, Any] | None],
) -> COCO:
    """An indexed `COCO` with ids from 1: pycocotools treats a match with annotation id 0 as no match."""
    kept = [(annotation, mask) for annotation, mask in zip(annotations, masks, strict=True) if mask]
    entries = [
        {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "segmentation": mask,
            "area": float(coco_mask.area(mask)),
            "bbox": [float(value) for value in annotation.get("bbox") or ()],
            "iscrowd": int(annotation.get("iscrowd", 0)),
            "score": float(annotation.get("score", 1.0)),
        }
        for number, (annotation, mask) in enumerate(kept, start=1)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
        "annotations": entries,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float | None:
    """Mean without the values of -1 by which pycocotools marks categories without objects."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def _warnings(num_objects: Mapping[tuple[Any, Any], int], num_queries: int | None) -> list[str]:
    limits = {f"{MAX_DETECTIONS} objects of a category": MAX_DETECTIONS}
    if num_queries is not None:
        limits[f"{num_queries} objects of a category, the model's object queries"] = num_queries
    found = []
    for name, limit in limits.items():
        beyond = {pair: num for pair, num in num_objects.items() if num > limit}
        if beyond:
            num_images = len({image for image, _ in beyond})
            found.append(
                f"{num_images} image(s) hold more than {name}, up to {max(beyond.values())}: recall cannot reach 1"
            )
    return found
