"""Mask logits to run-length codes at the original size, and run-length codes to polygons."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.masks import trace_outlines

Rle = dict[str, Any]
"""Compressed COCO RLE `{"size": [height, width], "counts": str}`, ready for JSON."""

JUST_OUTSIDE = -1e-30


def encode_logits(logits_HW: np.ndarray, size_hw: tuple[int, int]) -> Rle:
    """Enlarge mask logits (bilinear, half-pixel centres, as SAM 3 does) to `size_hw`, cut them at 0 and encode.

    The enlarged mask is never made. Along a column the enlarged logits are piecewise linear between the rows of the
    small map, so the runs begin and end where a piece crosses 0: work and memory grow with the small map's height times
    the large one's width, and columns without a positive value cost nothing.

    Args:
        logits_HW: float (h, w), any size.
        size_hw: Height and width of the original image in pixels.
    """
    size_hw = (int(size_hw[0]), int(size_hw[1]))
    toggles = _toggles(np.asarray(logits_HW, dtype=np.float32), size_hw)
    total = size_hw[0] * size_hw[1]
    runs = np.diff(np.concatenate([[0], toggles, [total]]))
    if len(runs) > 1 and runs[-1] == 0:
        runs = runs[:-1]
    rle = coco_mask.frPyObjects({"size": list(size_hw), "counts": runs}, *size_hw)
    return {"size": list(size_hw), "counts": rle["counts"].decode("ascii")}


def has_pixel(logits_HW: np.ndarray, size_hw: tuple[int, int]) -> bool:
    """Whether the mask that `encode_logits` makes of these logits has a pixel."""
    height, width = logits_HW.shape
    if size_hw[0] >= height and size_hw[1] >= width:
        # The centres of enlarged pixels are at most one small pixel apart: one of them lies within any 2 x 2 block.
        inside = np.asarray(logits_HW) > 0
        if (inside[1:, 1:] & inside[1:, :-1] & inside[:-1, 1:] & inside[:-1, :-1]).any():
            return True
    return len(_toggles(np.asarray(logits_HW, dtype=np.float32), size_hw)) > 0


def rle_area_px(rle: Rle) -> int:
    return int(coco_mask.area(rle))


def rle_box_xyxy(rle: Rle) -> tuple[float, float, float, float]:
    """Tight box in pixels; zeros for an empty mask."""
    x, y, width, height = (float(value) for value in coco_mask.toBbox(rle))
    return x, y, x + width, y + height


def rle_to_polygons(rle: Rle) -> list[list[float]]:
    """Outer outlines `[x0, y0, x1, y1, ...]` along the edges of pixels, one for each part; holes are lost.

    Read back as COCO polygons they give the same mask with its holes filled.

    >>> rectangle = coco_mask.encode(np.asfortranarray(np.pad(np.ones((3, 4), np.uint8), 1)))
    >>> rle_to_polygons(rectangle)
    [[1.0, 1.0, 1.0, 4.0, 5.0, 4.0, 5.0, 1.0]]
    """
    x, y, width, height = (int(value) for value in coco_mask.toBbox(rle))
    window = coco_mask.decode(rle)[y : y + height, x : x + width].astype(bool)
    outlines, _ = trace_outlines(window)
    return [np.add(corners, (x, y)).astype(float).ravel().tolist() for corners in outlines]


def _toggles(logits: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Where the column-major enlarged mask changes between 0 and 1, ascending positions in [0, height * width]."""
    positive = logits > 0
    rows, columns = np.flatnonzero(positive.any(1)), np.flatnonzero(positive.any(0))
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    height, width = size_hw
    small_h, small_w = logits.shape
    top, bottom = max(rows[0] - 1, 0), min(rows[-1] + 2, small_h)

    source_x = np.clip((np.arange(width) + 0.5) * (small_w / width) - 0.5, 0, small_w - 1)
    x_X = np.flatnonzero((source_x > columns[0] - 1) & (source_x < columns[-1] + 1))
    left = source_x[x_X].astype(np.int64)
    right = np.minimum(left + 1, small_w - 1)
    weight = (source_x[x_X] - left).astype(np.float32)[:, None]
    # A row of "just outside" above and below: every column begins and ends outside, so all columns are one sequence
    # whose changes are in the order of the codes, and a run that touches the border crosses 0 beyond it.
    band = np.full((small_w, bottom - top + 2), JUST_OUTSIDE, dtype=np.float32)
    band[:, 1:-1] = logits[top:bottom].T
    values_XR = band[left]
    values_XR *= 1 - weight
    values_XR += band[right] * weight

    values = values_XR.ravel()
    inside = values > 0
    last_before = np.flatnonzero(inside[1:] != inside[:-1])
    before, after = (values[last_before + step].astype(np.float64) for step in (0, 1))
    column, row = np.divmod(last_before, band.shape[1])
    crossing = top - 1 + row + before / (before - after)
    y = (crossing + 0.5) * (height / small_h) - 0.5
    # The first pixel behind the crossing: a pixel exactly on it has the value 0, which is outside.
    y = np.where(after > 0, np.floor(y) + 1, np.ceil(y)).clip(0, height).astype(np.int64)
    return _without_pairs(x_X[column] * height + y)


def _without_pairs(positions: np.ndarray) -> np.ndarray:
    """Of ascending positions those that occur an odd number of times.

    Two changes at one place, such as a column's end and the next one's beginning, are none.

    >>> _without_pairs(np.array([2, 5, 5, 7, 7, 7]))
    array([2, 7])
    """
    starts = np.flatnonzero(np.diff(positions, prepend=-1))
    counts = np.diff(starts, append=len(positions))
    return positions[starts[counts % 2 == 1]]
