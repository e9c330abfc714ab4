"""Measures of a binary map from four numbers of pixels: F, E, intersection over union and balanced error rate.

All work on arrays of any shape. `hits` are foreground pixels that are predicted, `predicted` all predicted pixels,
`positives` all foreground pixels, `total` all pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sam3lora.evaluation.dense.class_counts import ratio

BETA_SQUARED = 0.3
"""Weight of precision in the F measure of salient objects."""
_MIRROR_SMOOTHING = 1e-4


def f_measure(hits: ArrayLike, predicted: ArrayLike, positives: ArrayLike) -> np.ndarray:
    """(1 + b) P R / (b P + R) in [0, 1], with b = 0.3; 0 without a hit.

    Source: Achanta et al. 2009, "Frequency-tuned salient region detection".
    """
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(positives, 1)
    return f_of(precision, recall)


def smoothed_precision_recall(hits: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Precision and recall (2, ...) in (0, 1], each part and whole increased by 1e-4, as papers on mirrors have them.

    They average both over images first, and take F of the means; so an image without foreground counts, and the
    greatest F is not comparable to that of `f_measure`. Source: the evaluation script of HetNet (He et al. 2023).
    """
    return (hits + _MIRROR_SMOOTHING) / (np.stack(np.broadcast_arrays(predicted, positives)) + _MIRROR_SMOOTHING)


def f_of(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """(1 + b) P R / (b P + R), with b = 0.3; 0 where both are 0."""
    return np.nan_to_num(ratio((1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall))


def e_measure(hits: ArrayLike, predicted: ArrayLike, positives: ArrayLike, total: ArrayLike) -> np.ndarray:
    """Sum of (phi + 1)^2 / 4 over pixels / (total - 1), phi = 2 a b / (a^2 + b^2) of both maps less their means.

    In [0, total / (total - 1)]: the divisor is the authors', so a perfect map has slightly more than 1. Without
    foreground it is the share of unpredicted pixels, with nothing but foreground that of predicted ones.
    Source: Fan et al. 2018, "Enhanced-alignment measure", https://arxiv.org/abs/1805.10421
    """
    hits, predicted, positives, total = np.broadcast_arrays(hits, predicted, positives, total)
    mean_predicted, mean_true = predicted / total, positives / total
    sums = np.zeros(hits.shape)
    for is_predicted, is_true, pixels in (
        (1, 1, hits),
        (1, 0, predicted - hits),
        (0, 1, positives - hits),
        (0, 0, total - predicted - positives + hits),
    ):
        a, b = is_predicted - mean_predicted, is_true - mean_true
        phi = np.nan_to_num(ratio(2 * a * b, a**2 + b**2))
        sums += pixels * (phi + 1) ** 2 / 4
    sums = np.where(positives == 0, total - predicted, np.where(positives == total, predicted, sums))
    return sums / np.maximum(total - 1, 1)


def intersection_over_union(hits: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """In [0, 1]; 1 if neither map has foreground."""
    union = predicted + positives - hits
    return np.where(union == 0, 1.0, hits / np.maximum(union, 1))


def balanced_error(hits: np.ndarray, predicted: np.ndarray, positives: np.ndarray, total: np.ndarray) -> np.ndarray:
    """1 - (recall of the foreground + recall of the background) / 2, in [0, 1]; NaN if either has no pixel."""
    negatives = total - positives
    right_negatives = negatives - (predicted - hits)
    return 1 - (ratio(hits, positives) + ratio(right_negatives, negatives)) / 2
