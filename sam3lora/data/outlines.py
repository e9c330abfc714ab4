"""Outlines of masks along their pixel edges, and joining several outlines into one polygon."""

from __future__ import annotations

import cv2
import numpy as np


def trace_outlines(mask_HW: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Outer outlines of a boolean mask.

    OpenCV traces pixel centres. In the mask enlarged four times, these have coordinate 4x on a left or upper edge and
    4x - 1 on a right or lower one, so `(coordinate + 1) // 4` is the edge.

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
    enlarged = window.repeat(4, axis=0).repeat(4, axis=1)
    contours, hierarchy = cv2.findContours(enlarged, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    parents = hierarchy[0, :, 3]
    is_outer = parents < 0
    outlines = []
    for contour in (contour for contour, outer in zip(contours, is_outer, strict=True) if outer):
        corners = (contour.reshape(-1, 2) + 1) // 4
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
