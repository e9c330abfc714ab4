"""The shapes of a LabelMe file: polygons, circles, rectangles, and masks as PNG within their box."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledImage
from sam3lora.data.faults import FaultLog
from sam3lora.data.masks import decode_mask
from sam3lora.data.rle import encode_rle
from sam3lora.errors import UserError

CIRCLE_CORNERS = 64

_MASK_SLACK = 1  # pixels by which a mask may differ from its box: some tools leave the last row and column out
_KEPT_MODES = ("1", "L", "P", "I", "I;16")  # of pictures whose values are numbers, not colours
_DAMAGE = (
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    IndexError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
)


def read_shapes(shapes: list[Any], image: LabelledImage, log: FaultLog, label_file: str) -> None:
    """Add the objects; shapes that enclose nothing are counted as lost.

    Raises:
        UserError: A shape has no label, or its points or its mask cannot be read.
    """
    polygons: dict[Any, list[list[float]]] = {}
    masks: dict[Any, np.ndarray] = {}
    labels: dict[Any, tuple[str, str]] = {}
    for number, shape in enumerate(shapes, 1):
        where = f"{label_file}, shape {number}"
        label, kind, points = _parse_shape(shape, where)
        if kind == "rectangle" and len(points) >= 2:  # two opposite corners, or all four
            image.add_box(label, (*points.min(axis=0), *points.max(axis=0)), log, where)
            continue
        group = shape.get("group_id")
        key = number if group is None else (label, str(group))
        if kind == "mask" and shape.get("mask") is not None and len(points) >= 2:
            part_HW = _decode(shape["mask"], points, image.size_hw, where)
            mask_HW = _place(part_HW, points, image.size_hw, log, where)
            masks[key] = masks[key] | mask_HW if key in masks else mask_HW
        elif kind == "circle" and len(points) == 2:
            polygons.setdefault(key, []).append(_circle(*points).ravel().tolist())
        elif kind == "polygon" and len(points) >= 3:
            polygons.setdefault(key, []).append(points.ravel().tolist())
        else:
            image.lose(label, "skipped_shape", log, f"{where}: {kind} of {len(points)} points")
            continue
        labels.setdefault(key, (label, where))
    for key, (label, where) in labels.items():
        if key not in masks:
            image.add_mask(label, polygons[key], log, where)
            continue
        mask_HW = masks.pop(key)
        if key in polygons:
            mask_HW |= decode_mask([image.clip(part, log, where) for part in polygons[key]], image.size_hw)
        image.add_mask(label, encode_rle(mask_HW), log, where)


def _parse_shape(shape: Any, where: str) -> tuple[str, str, np.ndarray]:
    """(label, kind, points of shape (N, 2))."""
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}: expected a label, got {str(label)[:60]!r}")
    try:
        points = np.asarray(shape["points"], dtype=float).reshape(-1, 2)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: expected points [[x, y], ...], got {str(shape.get('points'))[:60]}") from None
    if not np.isfinite(points).all():
        raise UserError(f"{where}: points must be finite numbers")
    return label.strip(), str(shape.get("shape_type") or "polygon"), points


def _circle(centre: np.ndarray, edge: np.ndarray) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
    with np.errstate(over="ignore", invalid="ignore"):  # corners that are not finite are refused by `clip`
        return centre + np.hypot(*(edge - centre)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _decode(text: Any, points: np.ndarray, size_hw: tuple[int, int], where: str) -> np.ndarray:
    """Boolean mask (h, w) from a PNG in base64, which covers the pixels from the first point to the second, inclusive.

    Its size is compared with those of the box and the image before it is decoded.
    """
    corners = zip(points.min(axis=0).tolist(), points.max(axis=0).tolist(), strict=True)
    box_wh = [int(high) - int(low) + 1 for low, high in corners]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            width, height = picture.size
            off = max(abs(width - box_wh[0]), abs(height - box_wh[1]), width - size_hw[1], height - size_hw[0])
            if off <= _MASK_SLACK:
                return np.array(picture if picture.mode in _KEPT_MODES else picture.convert("L")) > 0
    except _DAMAGE as error:
        raise UserError(f"{where}: expected a mask as PNG in base64 ({str(error)[:100]})") from None
    raise UserError(
        f"{where}: the mask has {width} x {height} pixels, its box {box_wh[0]} x {box_wh[1]} and its image "
        f"{size_hw[1]} x {size_hw[0]}: expected a mask of the box's size"
    )


def _place(part_HW: np.ndarray, points: np.ndarray, size_hw: tuple[int, int], log: FaultLog, where: str) -> np.ndarray:
    """The mask (H, W) of the whole image; what lies outside of it is cut off and counted."""
    height, width = size_hw
    left, top = (int(value) for value in points.min(axis=0))
    x, y = min(max(left, 0), width), min(max(top, 0), height)
    inside = part_HW[max(y - top, 0) : max(height - top, 0), max(x - left, 0) : max(width - left, 0)]
    whole_HW = np.zeros(size_hw, dtype=bool)
    whole_HW[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    if part_HW.sum() > inside.sum():
        log.add("out_of_bounds", where)
    return whole_HW
