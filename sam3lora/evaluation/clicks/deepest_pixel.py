"""`deepest_pixel`: the pixel of a mask that is farthest from everything outside of it. The mask is not decoded.

The search is the one for a pole of inaccessibility, https://github.com/mapbox/polylabel : no pixel of a square is
deeper than its centre by more than the distance to its corner. So most squares are dropped, and the others divided,
down to single pixels. Depths are exact. Those of OpenCV's distance transform differ in the last bit among equal ones,
by where they lie in memory.

Shapes: `P` column pieces of a mask, `O` pixels of its outline, `N` squares. Positions count pixels column by column, in
the image with one pixel more on each side, so that a step to a neighbour never leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from pycocotools import mask as coco_mask
from scipy.spatial import cKDTree

from sam3lora.data.rle import rle_runs
from sam3lora.engine.mask_codes import Rle, rle_area_px

_FIRST_SQUARES = 16
"""Along the longer side of the box around a mask."""
_QUARTERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def deepest_pixel(rle: Rle, left_out_xy: Iterable[tuple[int, int]] = ()) -> tuple[float, int, int]:
    """Depth, x and y of the deepest pixel, the first of equal ones row by row.

    The depth of a pixel is its Euclidean distance to the nearest pixel outside of the mask, or of the image.

    Args:
        left_out_xy: Pixels that do not count.

    Returns:
        Depth 0 if no pixel counts.
    """
    if not rle_area_px(rle):
        return 0.0, 0, 0
    stride = rle["size"][0] + 2
    starts_P, ends_P = _column_pieces(rle)
    edges = np.stack([starts_P, ends_P], axis=1).ravel()
    x_O, y_O = np.divmod(_outline(starts_P, ends_P, stride), stride)
    # Building a tree that is not balanced takes a fraction of the time, and pixels lie evenly enough.
    outline = cKDTree(np.stack([y_O, x_O], axis=1), balanced_tree=False, compact_nodes=False)
    left_out = [(x + 1) * stride + y + 1 for x, y in left_out_xy]

    x, y, width, height = (int(value) for value in coco_mask.toBbox(rle))
    first_yx, last_yx = np.array([y + 1, x + 1]), np.array([y + height, x + width])
    side = 1 << ((max(width, height) - 1) // _FIRST_SQUARES).bit_length()
    num_rows, num_columns = (int(number) for number in (last_yx - first_yx) // side + 1)
    corners_N2 = first_yx + side * np.argwhere(np.ones((num_rows, num_columns)))
    best = 1.0  # every pixel of a mask is as deep
    while True:
        centres_N2 = np.minimum(corners_N2 + side // 2, last_yx)
        distance_N, _ = outline.query(centres_N2)
        position_N = centres_N2[:, 1] * stride + centres_N2[:, 0]
        is_inside_N = np.searchsorted(edges, position_N, side="right") % 2 == 1
        depth_N = np.where(is_inside_N & ~np.isin(position_N, left_out), distance_N, 0)
        best = max(best, depth_N.max(initial=0))
        if side == 1:
            break
        reach = 1.5 * (side // 2)  # at least the distance to the farthest pixel of a square
        most_N = np.where(is_inside_N, distance_N + reach, np.where(distance_N <= reach, reach, 0))
        side //= 2
        corners_N2 = (corners_N2[most_N >= best][:, None] + side * _QUARTERS).reshape(-1, 2)
        corners_N2 = corners_N2[(corners_N2 <= last_yx).all(axis=1)]
    deepest = centres_N2[depth_N == best]
    if not len(deepest):
        return 0.0, 0, 0
    y, x = min(deepest.tolist())
    return float(best), x - 1, y - 1


def _column_pieces(rle: Rle) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the first pixel of each piece of a column that a mask covers (P,), and of the one after its last."""
    height = rle["size"][0]
    changes = np.cumsum(rle_runs(rle))
    starts, ends = changes[:-1:2], changes[1::2]
    first_column = starts // height
    counts = (ends - 1) // height - first_column + 1
    column_P = _ranges(first_column, counts)
    top_P = np.maximum(np.repeat(starts, counts) - column_P * height, 0)
    bottom_P = np.minimum(np.repeat(ends, counts) - column_P * height, height)
    origin_P = (column_P + 1) * (height + 2) + 1
    return origin_P + top_P, origin_P + bottom_P


def _outline(starts_P: np.ndarray, ends_P: np.ndarray, stride: int) -> np.ndarray:
    """Positions (O,) outside of a mask that touch it above, below, left or right; some more than once."""
    beside = [_pixels_beside(starts_P + step, ends_P + step, starts_P, ends_P) for step in (-stride, stride)]
    return np.concatenate([starts_P - 1, ends_P, *beside])


def _pixels_beside(starts: np.ndarray, ends: np.ndarray, mask_starts: np.ndarray, mask_ends: np.ndarray) -> np.ndarray:
    """Positions in pieces and not in a mask, both given by ascending starts and ends."""
    changes = np.concatenate([starts, ends, mask_starts, mask_ends])
    order = np.argsort(changes, kind="stable")
    step = np.repeat([1, -1, -1, 1], [len(starts), len(ends), len(mask_starts), len(mask_ends)])
    changes, balance = changes[order], np.cumsum(step[order])  # 1 in a piece alone
    lengths = np.where(balance[:-1] == 1, np.diff(changes), 0)
    return _ranges(changes[:-1], lengths)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts` whole numbers from each of `starts` on, one after the other.

    >>> _ranges(np.array([5, 9]), np.array([2, 3])).tolist()
    [5, 6, 9, 10, 11]
    """
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
