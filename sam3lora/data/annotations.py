"""Cleaning one COCO annotation: repairs what can be repaired, drops the rest, and counts both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pycocotools import mask as coco_mask

from sam3lora.data.faults import FaultLog
from sam3lora.data.rle import read_rle

# As a share of the image. SAM 3's recipe drops smaller targets: their IoU is not stable.
MIN_BOX_AREA = 1e-6

_SLACK_PX = 1.0  # labelling tools round coordinates: a smaller excess is not reported as out of bounds

BoxXyxy = tuple[float, float, float, float]


def clean_annotation(raw: dict[str, Any], size_hw: tuple[int, int], log: FaultLog, where: str) -> dict[str, Any] | None:
    """Turn a raw annotation into a light record, counting every repair.

    The file's `area` is ignored: many exports write the area of the box there. The segmentation becomes JSON text:
    polygons and an RLE differ in type, and most stages list whole tables of records without looking at a mask, where
    a text takes a fifth of the memory of Python lists of numbers. `sam3lora.data.masks` parses it.

    Returns:
        `{"bbox_xywh": [4 floats within the image], "segmentation": JSON text or None, "iscrowd": bool}`, or None when
        nothing of the object is left.
    """
    segmentation, mask_xyxy = _clean_segmentation(raw.get("segmentation"), size_hw, log, where)
    raw_box = _read_box(raw.get("bbox"))
    box = _clip(raw_box, size_hw) if raw_box else None
    outside = _reaches_outside(raw_box, size_hw) or _reaches_outside(mask_xyxy, size_hw)
    mask_box = _clip(mask_xyxy, size_hw) if mask_xyxy else None
    if mask_box is not None and not _has_area(mask_box, size_hw):
        segmentation = mask_box = None
    if box is not None and not _has_area(box, size_hw):
        box = None
    if box is None and mask_box is None:
        log.add("empty_object", where)
        return None
    if outside:
        log.add("out_of_bounds", where)
    if box is None:
        log.add("mask_without_box", where)
    elif segmentation is None:
        log.add("box_without_mask", where)
    elif mask_box is not None and _iou(box, mask_box) < 0.5:
        log.add("box_mask_disagree", where)
    x0, y0, x1, y1 = box or mask_box  # type: ignore[misc]
    crowd = bool(raw.get("iscrowd"))
    if crowd:
        log.add("crowd", where)
    text = None if segmentation is None else json.dumps(segmentation, separators=(",", ":"))
    return {"bbox_xywh": [x0, y0, x1 - x0, y1 - y0], "segmentation": text, "iscrowd": crowd}


def _clean_segmentation(
    raw: Any, size_hw: tuple[int, int], log: FaultLog, where: str
) -> tuple[list | dict | None, BoxXyxy | None]:
    """The usable polygons or RLE, and their box xyxy before clipping; (None, None) without a usable mask."""
    if isinstance(raw, dict):
        return _clean_rle(raw, size_hw, log, where)
    if not isinstance(raw, list) or not raw:
        return None, None
    parts = [raw] if all(isinstance(v, int | float) for v in raw) else raw
    kept = []
    for part in parts:
        if not isinstance(part, list) or len(part) % 2 or not all(_is_finite(v) for v in part):
            log.add("bad_polygon", where)
        elif len(part) < 6:
            log.add("short_polygon", where)
        else:
            kept.append(part)
    if not kept:
        return None, None
    xs = [v for part in kept for v in part[0::2]]
    ys = [v for part in kept for v in part[1::2]]
    if all(_polygon_area(part) == 0 for part in kept):
        return None, None
    return kept, (float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys)))


def _clean_rle(
    raw: dict[str, Any], size_hw: tuple[int, int], log: FaultLog, where: str
) -> tuple[dict | None, BoxXyxy | None]:
    try:
        rle = read_rle(raw)
    except ValueError as error:
        log.add("bad_rle", f"{where}: {error}")
        return None, None
    if int(coco_mask.area(rle)) == 0:
        return None, None
    height, width = rle["size"]
    if (height, width) != tuple(size_hw):
        log.add("rle_size_mismatch", f"{where}: {width} x {height} in an image of {size_hw[1]} x {size_hw[0]}")
    scale_x, scale_y = size_hw[1] / width, size_hw[0] / height
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    box = (x * scale_x, y * scale_y, (x + w) * scale_x, (y + h) * scale_y)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}, box


def _read_box(raw: Any) -> BoxXyxy | None:
    """The file's xywh as xyxy; None if it is not a box with a positive width and height."""
    if not isinstance(raw, Sequence) or isinstance(raw, str) or len(raw) != 4 or not all(_is_finite(v) for v in raw):
        return None
    x, y, w, h = (float(v) for v in raw)
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None


def _clip(box: BoxXyxy, size_hw: tuple[int, int]) -> BoxXyxy:
    height, width = size_hw
    x0, y0, x1, y1 = box
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def _reaches_outside(box: BoxXyxy | None, size_hw: tuple[int, int]) -> bool:
    if box is None:
        return False
    height, width = size_hw
    return min(box[0], box[1]) < -_SLACK_PX or box[2] > width + _SLACK_PX or box[3] > height + _SLACK_PX


def _has_area(box: BoxXyxy, size_hw: tuple[int, int]) -> bool:
    return (box[2] - box[0]) * (box[3] - box[1]) >= MIN_BOX_AREA * size_hw[0] * size_hw[1]


def _iou(a: BoxXyxy, b: BoxXyxy) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union


def _polygon_area(part: list[float]) -> float:
    xs, ys = part[0::2], part[1::2]
    return 0.5 * abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
