"""The weighted F measure: errors weigh less beside the object, and depend on their neighbours inside it.

Source: Margolin et al. 2014, "How to evaluate foreground maps", CVPR.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from sam3lora.evaluation.dense.binary_image import BinaryImage

_WINDOW, _SIGMA = 7, 5.0  # of the Gaussian that spreads errors, in pixels
_DECAY = math.log(0.5) / 5  # an error five pixels away from the object weighs half as much more as one far away


def weighted_f(image: BinaryImage) -> float:
    """F with beta 1 of weighted precision and recall, in [0, 1]; 0 without foreground.

    An ignored pixel has no error and takes part in no sum.
    """
    truth_HW, error_HW = image.truth_HW, image.error_HW
    if not truth_HW.any():
        return 0.0
    outside_HW = ~truth_HW
    distance_HW, nearest_2HW = distance_transform_edt(outside_HW, return_indices=True)
    # outside of the object each pixel takes the error of the nearest object pixel, so that the mean does not mix both
    spread_HW = _smoothed(error_HW[tuple(nearest_2HW)])
    missed = np.minimum(error_HW, spread_HW)[truth_HW]
    positives = missed.size
    hits = positives - missed.sum()
    false_alarms = (error_HW[outside_HW] * (2 - np.exp(_DECAY * distance_HW[outside_HW]))).sum()
    recall = 1 - missed.mean()
    precision = hits / (hits + false_alarms) if hits > 0 else 0.0
    return float(2 * recall * precision / (recall + precision)) if recall + precision > 0 else 0.0


def _smoothed(values_HW: np.ndarray) -> np.ndarray:
    """Gaussian mean with a border of zeros."""
    weights = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    return cv2.sepFilter2D(values_HW, cv2.CV_64F, weights, weights, borderType=cv2.BORDER_CONSTANT)
