"""Where the user of the standard protocol clicks next, and the IoU of two masks.

Source: RITM (Sofiiuk et al. 2021, https://arxiv.org/abs/2102.06583), which SAM and SAM 2 follow too.

Shapes: `H` `W` pixels of the image.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from sam3lora.engine.clicks.click import Click


def next_click(
    truth_HW: np.ndarray, found_HW: np.ndarray, clicked: Iterable[Click] = (), ignored_HW: np.ndarray | None = None
) -> Click | None:
    """The pixel deepest inside an error: missed pixels get label 1, wrongly found ones label 0.

    The depth of a pixel is its Euclidean distance to the nearest pixel that is no error of the same kind, or lies
    outside of the image. Pixels clicked before have depth 0. A missed part has to be strictly deeper than a wrong
    one; among equal pixels the first row by row is taken.

    Args:
        truth_HW, found_HW: bool.
        ignored_HW: bool, pixels that are no error whatever they show, such as crowd regions.

    Returns:
        None if nothing is left to click on: no error, or every pixel of one clicked.
    """
    missed_HW, wrong_HW = truth_HW & ~found_HW, found_HW & ~truth_HW
    if ignored_HW is not None:
        missed_HW, wrong_HW = missed_HW & ~ignored_HW, wrong_HW & ~ignored_HW
    clicked = list(clicked)
    missed, wrong = _deepest(missed_HW, clicked), _deepest(wrong_HW, clicked)
    if max(missed[0], wrong[0]) == 0:
        return None
    label = int(missed[0] > wrong[0])
    _, x, y = missed if label else wrong
    return Click(x, y, label)


def _deepest(error_HW: np.ndarray, clicked: Iterable[Click]) -> tuple[float, int, int]:
    """Depth, x and y of the deepest pixel of an error, the first one row by row; depth 0 if there is none.

    Only the box around the error is looked at, since nothing outside of it has a depth: images may be large.
    """
    y_N, x_N = np.flatnonzero(error_HW.any(axis=1)), np.flatnonzero(error_HW.any(axis=0))
    if not len(y_N):
        return 0.0, 0, 0
    top, left = int(y_N[0]), int(x_N[0])
    depth_hw = _depth(error_HW[top : y_N[-1] + 1, left : x_N[-1] + 1])
    height, width = depth_hw.shape
    for click in clicked:
        x, y = int(click.x) - left, int(click.y) - top
        if 0 <= x < width and 0 <= y < height:
            depth_hw[y, x] = 0
    y, x = divmod(int(depth_hw.argmax()), width)
    return float(depth_hw[y, x]), left + x, top + y


def _depth(error_HW: np.ndarray) -> np.ndarray:
    padded = np.pad(error_HW, 1).astype(np.uint8)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def mask_iou(truth_HW: np.ndarray, found_HW: np.ndarray, ignored_HW: np.ndarray | None = None) -> float:
    """IoU in [0, 1] of bool masks outside of the ignored pixels; 1 if both are empty there.

    >>> truth, found = np.array([[True, True, False]]), np.array([[False, True, True]])
    >>> mask_iou(truth, found), mask_iou(truth, found, np.array([[True, False, False]]))
    (0.3333333333333333, 0.5)
    """
    valid_HW = True if ignored_HW is None else ~ignored_HW
    union = int(((truth_HW | found_HW) & valid_HW).sum())
    return int((truth_HW & found_HW & valid_HW).sum()) / union if union else 1.0
