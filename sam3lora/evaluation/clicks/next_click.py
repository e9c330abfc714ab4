"""Where the user of the standard protocol clicks next, and the IoU of two masks.

Source: RITM (Sofiiuk et al. 2021, https://arxiv.org/abs/2102.06583), which SAM and SAM 2 follow too.

Masks are run-length codes of one size. Only the box around an error is decoded: images may be large.

Shapes: `h` `w` pixels of that box, `N` deepest pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.rle import decode_window, rle_difference
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.mask_codes import Rle, rle_area_px


def next_click(truth: Rle, found: Rle, clicked: Iterable[Click] = (), ignored: Rle | None = None) -> Click | None:
    """The pixel deepest inside an error: missed pixels get label 1, wrongly found ones label 0.

    The depth of a pixel is its Euclidean distance to the nearest pixel that is no error of the same kind, or lies
    outside of the image. Pixels clicked before have depth 0. A missed part has to be strictly deeper than a wrong
    one; among equal pixels the first row by row is taken.

    Args:
        ignored: Pixels that are no error whatever they show, such as crowd regions.

    Returns:
        None if nothing is left to click on: no error, or every pixel of one clicked.
    """
    clicked = list(clicked)
    missed, wrong = (_deepest(error, clicked) for error in _errors(truth, found, ignored))
    if max(missed[0], wrong[0]) == 0:
        return None
    label = int(missed[0] > wrong[0])
    _, x, y = missed if label else wrong
    return Click(x, y, label)


def mask_iou(truth: Rle, found: Rle, ignored: Rle | None = None) -> float:
    """IoU in [0, 1] of masks outside of the ignored pixels; 1 if both are empty there.

    >>> from sam3lora.data.rle import encode_rle
    >>> masks = ([True, True, False], [False, True, True], [True, False, False])
    >>> truth, found, ignored = (encode_rle(np.array([pixels])) for pixels in masks)
    >>> mask_iou(truth, found), mask_iou(truth, found, ignored)
    (0.3333333333333333, 0.5)
    """
    missed, wrong = map(rle_area_px, _errors(truth, found, ignored))
    to_find = rle_area_px(truth if ignored is None else rle_difference(truth, ignored))
    union = to_find + wrong
    return (to_find - missed) / union if union else 1.0


def _errors(truth: Rle, found: Rle, ignored: Rle | None) -> tuple[Rle, Rle]:
    """The missed pixels and the wrong ones."""
    others = () if ignored is None else (ignored,)
    return rle_difference(truth, found, *others), rle_difference(found, truth, *others)


def _deepest(error: Rle, clicked: Iterable[Click]) -> tuple[int, int, int]:
    """Squared depth, x and y of the deepest pixel of an error, the first one row by row; depth 0 if there is none."""
    if not rle_area_px(error):
        return 0, 0, 0
    left, top, width, height = (int(value) for value in coco_mask.toBbox(error))
    error_hw = np.pad(decode_window(error, left, top, width, height).astype(np.uint8), 1)
    depth_hw = cv2.distanceTransform(error_hw, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    for click in clicked:
        x, y = int(click.x) - left, int(click.y) - top
        if 0 <= x < width and 0 <= y < height:
            depth_hw[y, x] = 0
    # Equal depths may differ in the last bit, by where the array lies in memory; their squares are whole numbers.
    y_N, x_N = np.nonzero(depth_hw >= depth_hw.max() * (1 - 1e-6))
    squared_N = np.rint(np.square(depth_hw[y_N, x_N], dtype=np.float64)).astype(int)
    first = int(squared_N.argmax())
    return int(squared_N[first]), left + int(x_N[first]), top + int(y_N[first])
