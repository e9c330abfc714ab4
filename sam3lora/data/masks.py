"""Pixels, areas and boxes of COCO segmentations, and outlines of masks.

A segmentation is a list of polygons `[[x0, y0, x1, y1, ...], ...]` in pixels of the annotated image, an RLE
`{"size": [height, width], "counts": ...}`, one of these as JSON text (in the records of an index), or None.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.augment import Placement
from sam3lora.data.rle import read_rle

Segmentation = str | list | dict | None


def parse_segmentation(segmentation: Segmentation) -> list | dict | None:
    """Polygons or RLE of a segmentation; None if it is empty."""
    if isinstance(segmentation, str):
        return msgspec.json.decode(segmentation) or None
    return segmentation or None


def encode_segmentation(segmentation: Segmentation, size_hw: tuple[int, int]) -> dict[str, Any] | None:
    """One COCO RLE `{"size": [height, width], "counts": bytes}` of all parts; None without a mask.

    `size_hw` is the size of the annotated image, for polygons; an RLE has its own.
    """
    parsed = parse_segmentation(segmentation)
    if parsed is None:
        return None
    if isinstance(parsed, dict):
        return read_rle(parsed)
    height, width = size_hw
    parts = coco_mask.frPyObjects(parsed, height, width)
    return parts[0] if len(parts) == 1 else coco_mask.merge(parts)


def encode_mask_at(segmentation: Segmentation, size_hw: tuple[int, int]) -> dict[str, Any] | None:
    """As `encode_segmentation`, but an RLE of another size is rescaled to `size_hw`."""
    rle = encode_segmentation(segmentation, size_hw)
    if rle is None or tuple(rle["size"]) == tuple(size_hw):
        return rle
    resized = _resize_coverage(coco_mask.decode(rle), size_hw) > 0.5
    return coco_mask.encode(np.asfortranarray(resized, dtype=np.uint8))


def decode_mask(segmentation: Segmentation, size_hw: tuple[int, int]) -> np.ndarray:
    """Boolean mask (H, W) at `size_hw`; an RLE of another size is rescaled. All False without a mask."""
    rle = encode_mask_at(segmentation, size_hw)
    return np.zeros(size_hw, dtype=bool) if rle is None else coco_mask.decode(rle).astype(bool)


def mask_area(segmentation: Segmentation, size_hw: tuple[int, int]) -> int:
    """Number of pixels of the mask at the annotated size; 0 without a mask.

    >>> mask_area([[1, 1, 4, 1, 4, 3, 1, 3]], (8, 8))
    6
    """
    rle = encode_segmentation(segmentation, size_hw)
    return 0 if rle is None else int(coco_mask.area(rle))


def mask_box(segmentation: Segmentation, size_hw: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Tight box (x, y, width, height) around the mask's pixels; None if it has none."""
    rle = encode_segmentation(segmentation, size_hw)
    if rle is None or coco_mask.area(rle) == 0:
        return None
    x, y, width, height = (float(v) for v in coco_mask.toBbox(rle))
    return x, y, width, height


def place_mask(
    segmentation: Segmentation, size_hw: tuple[int, int], placement: Placement, mask_size: int
) -> np.ndarray | None:
    """Draw a mask in the model's frame.

    Polygons are scaled first and then drawn: thin shapes would vanish if they were drawn first and shrunk afterwards.
    Run-length masks are shrunk by area, moved with sub-pixel accuracy and thresholded at one half.

    Returns:
        Boolean mask (M, M) of the whole frame for `mask_size` M, or None without a mask.
    """
    parsed = parse_segmentation(segmentation)
    if parsed is None:
        return None
    if isinstance(parsed, list):
        return _place_polygons(parsed, size_hw, placement, mask_size)
    return _place_bitmap(coco_mask.decode(read_rle(parsed)), placement, mask_size)


def _place_polygons(
    polygons: list[list[float]], size_hw: tuple[int, int], placement: Placement, mask_size: int
) -> np.ndarray:
    """Draw in a window around the object: most objects are much smaller than the frame."""
    parts = [_place_points(part, size_hw, placement, mask_size) for part in polygons]
    left, right = _window([part[0::2] for part in parts], mask_size)
    top, bottom = _window([part[1::2] for part in parts], mask_size)
    for part in parts:
        part[0::2] -= left
        part[1::2] -= top
    rles = coco_mask.frPyObjects(parts, bottom - top, right - left)
    mask = np.zeros((mask_size, mask_size), dtype=bool)
    mask[top:bottom, left:right] = coco_mask.decode(rles[0] if len(rles) == 1 else coco_mask.merge(rles))
    return mask


def _place_points(points: list[float], size_hw: tuple[int, int], placement: Placement, mask_size: int) -> np.ndarray:
    """`x0, y0, x1, y1, ...` in pixels of the mask; as `Placement.map_points`, without its copies."""
    found = np.array(points, dtype=np.float64)
    found[0::2] /= size_hw[1]
    found[1::2] /= size_hw[0]
    if placement.flip:
        found[0::2] = 1.0 - found[0::2]
    if placement.flip_vertical:
        found[1::2] = 1.0 - found[1::2]
    found *= placement.scale
    found[0::2] += placement.offset_x
    found[1::2] += placement.offset_y
    found *= mask_size
    return found


def _window(coordinates: list[np.ndarray], mask_size: int) -> tuple[int, int]:
    """Half-open range of the pixels to draw in: the object and a pixel on each side, at least one pixel wide."""
    low = min(float(part.min()) for part in coordinates)
    high = max(float(part.max()) for part in coordinates)
    first = min(max(math.floor(low) - 1, 0), mask_size - 1)
    return first, max(first + 1, min(math.ceil(high) + 1, mask_size))


def _place_bitmap(mask: np.ndarray, placement: Placement, mask_size: int) -> np.ndarray:
    extent = placement.scale * mask_size
    side = max(1, round(extent))
    coverage = _resize_coverage(mask, (side, side))
    if placement.flip:
        coverage = coverage[:, ::-1]
    if placement.flip_vertical:
        coverage = coverage[::-1]
    if side == mask_size and placement.is_full_frame:
        return coverage > 0.5
    # pixel centres: u' = (u + 0.5) * extent / side + offset - 0.5
    step = extent / side
    left, top = placement.offset_x * mask_size, placement.offset_y * mask_size
    matrix = np.array([[step, 0, 0.5 * step + left - 0.5], [0, step, 0.5 * step + top - 0.5]])
    placed = cv2.warpAffine(np.ascontiguousarray(coverage), matrix, (mask_size, mask_size), flags=cv2.INTER_LINEAR)
    return placed > 0.5


def _resize_coverage(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Share of each new pixel that the mask covers, as float32 in [0, 1]."""
    shrinks = size_hw[0] < mask.shape[0] or size_hw[1] < mask.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.float32), size_hw[::-1], interpolation=interpolation)


def trace_outlines(mask_HW: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Outer outlines of a mask.

    OpenCV traces pixel centres. In the mask enlarged twice, these have coordinate 2x on a left or upper edge and 2x - 1
    on a right or lower one, so `(coordinate + 1) // 2` is the edge.

    Args:
        mask_HW: Boolean mask.

    Returns:
        Corners (N, 2) as x, y in pixels of each connected part, and the number of holes. Holes are not outlined, nor
        are parts inside them.

    >>> trace_outlines(np.ones((2, 3), dtype=bool))[0][0].tolist()
    [[0, 0], [0, 2], [3, 2], [3, 0]]
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not rows.size:
        return [], 0
    window = mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    enlarged = window.repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(enlarged, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    parents = hierarchy[0, :, 3]
    is_outer = parents < 0
    outlines = []
    for contour in (contour for contour, outer in zip(contours, is_outer, strict=True) if outer):
        corners = (contour.reshape(-1, 2) + 1) // 2
        corners = corners[np.any(corners != np.roll(corners, 1, axis=0), axis=1)]
        outlines.append(np.add(corners, (columns[0], rows[0])))
    return outlines, int(np.isin(parents, np.flatnonzero(is_outer)).sum())


def join_outlines(outlines: list[np.ndarray]) -> np.ndarray:
    """One closed line (M, 2) around all parts, connected by bridges: lines without area, there and back."""
    from scipy.spatial import cKDTree  # slow to import, and tracing does without

    ring, *rest = sorted(outlines, key=len, reverse=True)
    for part in rest:
        distances, nearest = cKDTree(ring).query(part)
        start = int(distances.argmin())
        bridge = int(nearest[start])
        loop = np.roll(part, -start, axis=0)
        ring = np.concatenate([ring[: bridge + 1], loop, loop[:1], ring[bridge:]])
    return ring
