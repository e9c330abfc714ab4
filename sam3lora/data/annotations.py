"""Cleaning one COCO annotation or result: repairs what can be repaired, refuses the rest, and counts both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from sam3lora.data.faults import FaultLog
from sam3lora.data.polygons import MAX_OUTLINE_PX, area_of, clip_far, extent, flatten_parts, is_finite, outline_px
from sam3lora.data.rle import read_rle

# As a share of the image. SAM 3's recipe drops smaller targets: their IoU is not stable.
MIN_BOX_AREA = 1e-6

SLACK_PX = 1.0  # labelling tools round coordinates: a smaller excess is not reported as out of bounds

AGREEING_IOU = 0.5  # of a box and its mask; below, they disagree

SHARE_SLACK = 1e-3
_MAX_RLE_SHARE, _SMALL_RLE_PX = 16, 4_000_000  # a mask is decoded to be scaled: a byte for each of its pixels
_MIN_SIDE_FOR_SHARES = 8  # of an image; a label within one pixel of a smaller one may be meant

BoxXyxy = tuple[float, float, float, float]


class LabelError(ValueError):
    """A label whose box and mask cannot be interpreted; it is counted already."""


def clean_annotation(
    raw: Mapping[str, Any], size_hw: tuple[int, int], log: FaultLog, where: str
) -> dict[str, Any] | None:
    """Turn a raw annotation into a light record, counting every repair.

    The file's `area` is ignored: many exports write the area of the box there. The segmentation becomes JSON text:
    polygons and an RLE differ in type, and most stages list whole tables of records without looking at a mask, where
    a text takes a fifth of the memory of Python lists of numbers. `sam3lora.data.masks` parses it.

    Returns:
        `{"bbox_xywh": [4 floats within the image], "segmentation": JSON text or None, "iscrowd": bool}`, or None when
        nothing of the object is left.

    Raises:
        LabelError: Neither box nor mask can be read.
    """
    found = _Found(log, where)
    segmentation, mask_xyxy = _clean_segmentation(raw.get("segmentation"), size_hw, found)
    raw_box = _read_box(raw.get("bbox"), found)
    if _is_in_shares(raw_box, segmentation, size_hw):
        log.add("shares", where)
        raise LabelError(where)
    box = _clip(raw_box, size_hw) if raw_box else None
    outside = found.outside or _reaches_outside(raw_box, size_hw)
    mask_box = _clip(mask_xyxy, size_hw) if mask_xyxy else None
    if mask_box is not None and not _has_area(mask_box, size_hw):
        segmentation = mask_box = None
    if box is not None and not _has_area(box, size_hw):
        box = None
    if box is None and mask_box is None:
        if found.broken:
            log.add("unreadable_label", where)
            raise LabelError(where)
        log.add("empty_object", where)
        return None
    if outside:
        log.add("out_of_bounds", where)
    if box is None:
        log.add("mask_without_box", where)
    elif segmentation is None:
        log.add("box_without_mask", where)
    elif mask_box is not None and _iou(box, mask_box) < AGREEING_IOU:
        log.add("box_mask_disagree", where)
    x0, y0, x1, y1 = box or mask_box  # type: ignore[misc]
    crowd = _read_flag(raw.get("iscrowd"), log, where)
    if crowd:
        log.add("crowd", where)
    text = None if segmentation is None else json.dumps(segmentation, separators=(",", ":"))
    return {"bbox_xywh": [x0, y0, x1 - x0, y1 - y0], "segmentation": text, "iscrowd": crowd}


class _Found:
    """Counts the faults of one annotation.

    `broken` is whether any of them hides what the annotation marks, `outside` whether its mask leaves the image.
    """

    def __init__(self, log: FaultLog, where: str) -> None:
        self._log, self._where = log, where
        self.broken = self.outside = False

    def add(self, kind: str, detail: str = "", *, broken: bool = True) -> None:
        self._log.add(kind, f"{self._where}: {detail}" if detail else self._where)
        self.broken |= broken


def _clean_segmentation(raw: Any, size_hw: tuple[int, int], found: _Found) -> tuple[list | dict | None, BoxXyxy | None]:
    """The usable polygons or RLE, and their box xyxy; (None, None) without a usable mask."""
    if raw is None or raw == [] or raw == "":
        return None, None
    if isinstance(raw, dict) or (isinstance(raw, list) and all(isinstance(part, dict) for part in raw)):
        return _clean_rle(raw if isinstance(raw, list) else [raw], size_hw, found)
    if not isinstance(raw, list):
        found.add("bad_polygon", f"{type(raw).__name__} instead of lists of numbers")
        return None, None
    kept = []
    for part in flatten_parts(raw):
        if not isinstance(part, list) or len(part) % 2 or not all(map(is_finite, part)):
            found.add("bad_polygon")
        elif len(part) < 6:
            found.add("short_polygon", broken=False)
        else:
            kept.append(part)
    if not kept:
        return None, None
    found.outside = _reaches_outside(extent(kept), size_hw)
    kept = [clipped for part in kept if len(clipped := clip_far(part, size_hw)) >= 6]
    if outline_px(kept) > MAX_OUTLINE_PX:
        found.add("bad_polygon", f"an outline of more than {MAX_OUTLINE_PX:.0f} pixels")
        return None, None
    if all(area_of(part) == 0 for part in kept):
        return None, None
    return kept, extent(kept)


def _clean_rle(
    raw: Sequence[Mapping[str, Any]], size_hw: tuple[int, int], found: _Found
) -> tuple[dict | None, BoxXyxy | None]:
    """One mask of one or several RLEs of the same size."""
    try:
        parts = [read_rle(part) for part in raw]
        if len({tuple(part["size"]) for part in parts}) > 1:
            raise ValueError("its parts differ in size")
        if any(math.prod(part["size"]) > max(_MAX_RLE_SHARE * math.prod(size_hw), _SMALL_RLE_PX) for part in parts):
            raise ValueError("it is many times larger than its image")
    except ValueError as error:
        found.add("bad_rle", str(error))
        return None, None
    rle = parts[0] if len(parts) == 1 else coco_mask.merge(parts)
    if int(coco_mask.area(rle)) == 0:
        return None, None
    height, width = (int(side) for side in rle["size"])
    if (height, width) != tuple(size_hw):
        detail = f"{width} x {height} in an image of {size_hw[1]} x {size_hw[0]}"
        found.add("rle_size_mismatch", detail, broken=False)
    scale_x, scale_y = size_hw[1] / width, size_hw[0] / height
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    box = (x * scale_x, y * scale_y, (x + w) * scale_x, (y + h) * scale_y)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}, box


def _read_box(raw: Any, found: _Found) -> BoxXyxy | None:
    """The file's xywh as xyxy; None if it is not a box with a positive width and height."""
    if raw is None or raw == []:
        return None
    if not isinstance(raw, list | tuple) or len(raw) != 4 or not all(map(is_finite, raw)):
        found.broken = True
        return None
    x, y, w, h = (float(v) for v in raw)
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None


def _read_flag(raw: Any, log: FaultLog, where: str) -> bool:
    """COCO's flags are 0 and 1; exports also write true, 1.0, "0" and null."""
    text = str(raw).strip().casefold()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text not in ("0", "0.0", "false", "no", "none", ""):
        log.add("bad_flag", f"{where}: {text[:20]}")
    return False


def _is_in_shares(box: BoxXyxy | None, segmentation: list | dict | None, size_hw: tuple[int, int]) -> bool:
    """Whether all coordinates lie within the first pixel, with fractions: they are shares of the image's size."""
    if isinstance(segmentation, dict) or min(size_hw) < _MIN_SIDE_FOR_SHARES:
        return False
    values = [*(box or ()), *(value for part in segmentation or () for value in part)]
    return (
        bool(values)
        and min(values) >= -SHARE_SLACK
        and max(values) <= 1 + SHARE_SLACK
        and any(value != int(value) for value in values)
    )


def _clip(box: BoxXyxy, size_hw: tuple[int, int]) -> BoxXyxy:
    height, width = size_hw
    x0, y0, x1, y1 = box
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def _reaches_outside(box: BoxXyxy | None, size_hw: tuple[int, int]) -> bool:
    if box is None:
        return False
    height, width = size_hw
    return min(box[0], box[1]) < -SLACK_PX or box[2] > width + SLACK_PX or box[3] > height + SLACK_PX


def _has_area(box: BoxXyxy, size_hw: tuple[int, int]) -> bool:
    return (box[2] - box[0]) * (box[3] - box[1]) >= MIN_BOX_AREA * size_hw[0] * size_hw[1]


def _iou(a: BoxXyxy, b: BoxXyxy) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union
