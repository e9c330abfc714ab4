"""Polygons as lists `x0, y0, x1, y1, ...` in pixels: reading their spellings, and clipping them to the image.

pycocotools walks along the whole outline of a polygon, in memory, wherever it leads. So a polygon that leads far out of
its image is clipped before it gets there, and one with an endless outline is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_COORDINATE = 1e10
"""Larger numbers are no coordinates."""

MAX_OUTLINE_PX = 2e6
"""Longest outline of an object; drawing one takes 100 bytes a pixel."""

_MAX_NESTING = 4


def flatten_parts(raw: Any) -> list[Any]:
    """The parts of a polygon mask as flat lists, from all spellings that can be read in one way only.

    A value that is no list of numbers stays as it is.

    >>> flatten_parts([1, 1, 5, 1, 5, 5]) == flatten_parts([[[1, 1], [5, 1], [5, 5]]]) == [[1, 1, 5, 1, 5, 5]]
    True
    """
    if _is_flat(raw):
        return [raw]
    if _is_point_list(raw) and len(raw) > 2:
        return [[value for point in raw for value in point]]
    return _parts(raw, 1)


def _parts(raw: list[Any], depth: int) -> list[Any]:
    parts: list[Any] = []
    for part in raw:
        if not isinstance(part, list) or _is_flat(part) or depth == _MAX_NESTING:
            parts.append(part)
        elif _is_point_list(part):
            parts.append([value for point in part for value in point])
        else:
            parts += _parts(part, depth + 1)
    return parts


def is_finite(value: Any) -> bool:
    """Whether a value is a number of at most `MAX_COORDINATE`."""
    # compared as it is: an integer of hundreds of digits cannot become a float
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE


def area_of(part: Sequence[float]) -> float:
    """Area in square pixels (shoelace formula)."""
    xs, ys = part[0::2], part[1::2]
    return 0.5 * abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))))


def outline_px(parts: Sequence[Sequence[float]]) -> float:
    """Length of all outlines, measured along the longer axis of each edge."""
    total = 0.0
    for part in parts:
        points = np.reshape(part, (-1, 2))
        total += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
    return total


def clip_far(part: list[float], size_hw: tuple[int, int]) -> list[float]:
    """The part itself if it stays within an image's width and height around the image; else what is in the image."""
    height, width = size_hw
    xs, ys = part[0::2], part[1::2]
    if -width <= min(xs) and max(xs) <= 2 * width and -height <= min(ys) and max(ys) <= 2 * height:
        return part
    points = list(zip(map(float, xs), map(float, ys), strict=True))
    for axis, limit in ((0, 0.0), (0, float(width)), (1, 0.0), (1, float(height))):
        points = _clip_at(points, axis, limit, keep_above=limit == 0)
    return [value for point in points for value in point]


def _clip_at(
    points: list[tuple[float, float]], axis: int, limit: float, *, keep_above: bool
) -> list[tuple[float, float]]:
    """The polygon on one side of a line parallel to an axis.

    Sutherland and Hodgman (1974), "Reentrant polygon clipping", https://doi.org/10.1145/360767.360802
    """
    kept: list[tuple[float, float]] = []
    for last, point in zip(points[-1:] + points[:-1], points, strict=True):
        inside, was_inside = ((p[axis] >= limit) == keep_above or p[axis] == limit for p in (point, last))
        if inside != was_inside:
            share = (limit - last[axis]) / (point[axis] - last[axis])
            other = last[1 - axis] + share * (point[1 - axis] - last[1 - axis])
            kept.append((limit, other) if axis == 0 else (other, limit))
        if inside:
            kept.append(point)
    return kept


def _is_flat(raw: Any) -> bool:
    return isinstance(raw, list) and not any(isinstance(value, list | dict) for value in raw)


def _is_point_list(raw: Any) -> bool:
    return isinstance(raw, list) and bool(raw) and all(_is_flat(point) and len(point) == 2 for point in raw)


def extent(parts: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Box xyxy around all points."""
    xs = [value for part in parts for value in part[0::2]]
    ys = [value for part in parts for value in part[1::2]]
    return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
