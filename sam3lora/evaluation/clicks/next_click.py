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
    depths_2HW = np.stack([_depth(missed_HW), _depth(wrong_HW)])
    for click in clicked:
        depths_2HW[:, int(click.y), int(click.x)] = 0
    deepest_missed, deepest_wrong = depths_2HW.reshape(2, -1).max(axis=1)
    if max(deepest_missed, deepest_wrong) == 0:
        return None
    label = int(deepest_missed > deepest_wrong)
    y, x = np.unravel_index(depths_2HW[1 - label].argmax(), truth_HW.shape)
    return Click(int(x), int(y), label)


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
