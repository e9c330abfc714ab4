"""The structure measure of a probability map: similar means of object and background, and similar quarters.

S = max(0, (object + region) / 2). Source: Fan et al. 2017, "Structure-measure", https://arxiv.org/abs/1708.00786
"""

from __future__ import annotations

import numpy as np

from sam3lora.evaluation.dense.binary_image import BinaryImage


def s_measure(image: BinaryImage) -> float:
    """In [0, 1]. Without foreground 1 - mean probability, with nothing else the mean probability."""
    share = image.labels.mean()
    if share in (0, 1):
        mean = image.values.mean()
        return float(mean if share else 1 - mean)
    foreground, background = image.values[image.labels], 1 - image.values[~image.labels]
    of_object = share * _uniformly_high(foreground) + (1 - share) * _uniformly_high(background)
    return max(0.0, float(0.5 * of_object + 0.5 * _region(image)))


def _uniformly_high(values: np.ndarray) -> float:
    """2 m / (m^2 + 1 + std), 1 where all values are 1."""
    mean = values.mean()
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation)


def _region(image: BinaryImage) -> float:
    """Similarity of the quarters that the centroid of the foreground makes, weighted by their valid pixels."""
    truth_HW = image.truth_HW
    in_row, in_column = truth_HW.sum(axis=1), truth_HW.sum(axis=0)
    row, column = (int(np.round(np.average(np.arange(len(n)), weights=n))) + 1 for n in (in_row, in_column))
    total = 0.0
    for rows in (slice(row), slice(row, None)):
        for columns in (slice(column), slice(column, None)):
            probabilities, truth = image.probability_HW[rows, columns].ravel(), truth_HW[rows, columns].ravel()
            if image.valid_HW is not None:
                valid = image.valid_HW[rows, columns].ravel()
                probabilities, truth = probabilities[valid], truth[valid]
            if truth.size:
                total += truth.size * _similarity(probabilities, truth)
    return total / image.values.size


def _similarity(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """4 x y cov / ((x^2 + y^2) (vx + vy)) of means x, y and variances; 1 if numerator and denominator are 0."""
    size, x, y = truth.size, probabilities.mean(), truth.mean()
    centred = probabilities - x
    if probabilities.min() == probabilities.max():  # their mean may be off in the last bit
        centred = np.zeros(size)
    degrees = max(size - 1, 1)
    covariance = (centred @ (truth - y)) / degrees
    variances = (centred @ centred + size * y * (1 - y)) / degrees
    numerator = 4 * x * y * covariance
    denominator = (x**2 + y**2) * variances
    if numerator == 0:
        return float(denominator == 0)
    return numerator / denominator
