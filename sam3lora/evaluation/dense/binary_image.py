"""A predicted probability map and its binary truth, in the form that the metrics of binary tasks read.

Shapes: `H` `W` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sam3lora.label_values import IGNORE

NUM_LEVELS = 256
"""Thresholds of all curves: those of an 8-bit map."""
DECISION = 0.5
"""Probability from which a pixel counts as foreground."""


@dataclass(frozen=True)
class BinaryImage:
    """One image of a binary task.

    Attributes:
        probability_HW: float64 in [0, 1].
        truth_HW: bool, False where ignored.
        valid_HW: bool, False where ignored; None if no pixel is.
    """

    probability_HW: np.ndarray
    truth_HW: np.ndarray
    valid_HW: np.ndarray | None

    @classmethod
    def of(cls, prediction_HW: np.ndarray, truth_HW: np.ndarray) -> BinaryImage:
        """From a prediction, uint8 (probability x 255) or floating point in [0, 1], and a truth, bool or 0, 1, 255.

        Raises:
            ValueError: The sizes differ, or a value is out of range.
        """
        if prediction_HW.shape != truth_HW.shape or prediction_HW.ndim != 2 or not prediction_HW.size:
            raise ValueError(f"expected two maps of one size, got {prediction_HW.shape} and {truth_HW.shape}")
        if prediction_HW.dtype == np.uint8:
            probability_HW = prediction_HW / 255
        elif np.issubdtype(prediction_HW.dtype, np.floating):
            probability_HW = prediction_HW.astype(np.float64)
            low, high = probability_HW.min(), probability_HW.max()
            if not 0 <= low <= high <= 1:
                raise ValueError(f"expected probabilities from 0 to 1, got {low:g} to {high:g}")
        else:
            raise ValueError(f"expected probabilities as uint8 or floating point, got {prediction_HW.dtype}")
        if truth_HW.dtype == bool:
            return cls(probability_HW, truth_HW, None)
        is_foreground, is_ignored = truth_HW == 1, truth_HW == IGNORE
        wrong = truth_HW[~(is_foreground | is_ignored | (truth_HW == 0))]
        if wrong.size:
            raise ValueError(f"expected a truth of 0, 1 and {IGNORE} (ignored), got {wrong[0]}")
        return cls(probability_HW, is_foreground, ~is_ignored if is_ignored.any() else None)

    def stretched(self) -> BinaryImage:
        """The image with its probabilities moved to [0, 1] linearly, as many papers do; a constant map stays.

        A map of an image without any object is stretched as well, so values of this kind compare with papers only.
        """
        low, high = self.values.min(initial=1), self.values.max(initial=0)
        if high <= low:
            return self
        stretched_HW = (self.probability_HW - low) / (high - low)
        if self.valid_HW is not None:
            stretched_HW = np.where(self.valid_HW, stretched_HW, 0)
        return BinaryImage(stretched_HW, self.truth_HW, self.valid_HW)

    @cached_property
    def values(self) -> np.ndarray:
        """Probabilities of the valid pixels (P,)."""
        return self.probability_HW.ravel() if self.valid_HW is None else self.probability_HW[self.valid_HW]

    @cached_property
    def labels(self) -> np.ndarray:
        """Truth of the valid pixels (P,)."""
        return self.truth_HW.ravel() if self.valid_HW is None else self.truth_HW[self.valid_HW]

    @cached_property
    def error_HW(self) -> np.ndarray:
        """|probability - truth|, 0 where ignored."""
        error_HW = np.abs(self.probability_HW - self.truth_HW)
        return error_HW if self.valid_HW is None else np.where(self.valid_HW, error_HW, 0)

    def histograms(self) -> np.ndarray:
        """Valid pixels (2, 256) of background and foreground by their 8-bit probability, rounded down."""
        levels = (self.values * (NUM_LEVELS - 1)).astype(np.int16) + NUM_LEVELS * self.labels
        return np.bincount(levels, minlength=2 * NUM_LEVELS).reshape(2, NUM_LEVELS)

    def counts_from(self, threshold: float) -> tuple[int, int]:
        """Number of valid pixels at or above a probability, of the foreground alone and of all."""
        chosen = self.values >= threshold
        return int((chosen & self.labels).sum()), int(chosen.sum())
