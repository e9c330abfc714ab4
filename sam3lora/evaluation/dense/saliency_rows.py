"""What every image of a binary task leaves, and metrics of any weighting of the images from it.

Shapes: `I` images, `T` the 256 thresholds, `N` numbers of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from sam3lora.evaluation.dense.binary_image import NUM_LEVELS
from sam3lora.evaluation.dense.class_counts import number_or_none, ratio
from sam3lora.evaluation.dense.threshold_measures import (
    balanced_error,
    e_measure,
    f_measure,
    f_of,
    intersection_over_union,
    smoothed_precision_recall,
)
from sam3lora.evaluation.metrics.bootstrap import Metric

NUMBERS = ("mae", "s_measure", "weighted_f", "f_adaptive", "e_adaptive", "hits", "predicted")
"""Names of the numbers of an image that need its pixels; the last two are counts at probability 0.5."""


@dataclass(frozen=True)
class SaliencyRows:
    """What every image of a set left, and metrics of any weighting of the images.

    Attributes:
        image_ids: The images in the order of all rows.
        numbers_IN: Numbers of each image.
        histograms_I2T: Pixels of background and foreground by 8-bit probability.
    """

    image_ids: list[int]
    numbers_IN: np.ndarray
    histograms_I2T: np.ndarray

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Values (I,) of each image by name, such as mae, s_measure, weighted_f, iou_per_image and ber (may be NaN)."""
        columns = dict(zip(NUMBERS, self.numbers_IN.T, strict=True))
        hits, predicted = columns["hits"], columns["predicted"]
        columns["iou_per_image"] = intersection_over_union(hits, predicted, self.positives_I)
        columns["ber"] = balanced_error(hits, predicted, self.positives_I, self._totals_I)
        return columns

    @cached_property
    def positives_I(self) -> np.ndarray:
        """Foreground pixels of each image."""
        return self.histograms_I2T[:, 1].sum(axis=1)

    @cached_property
    def f_curves_IT(self) -> np.ndarray:
        """F measure of each image at probability >= t / 255."""
        return f_measure(self._hits_IT, self._predicted_IT, self.positives_I[:, None])

    @cached_property
    def e_curves_IT(self) -> np.ndarray:
        """E measure of each image at probability >= t / 255."""
        return e_measure(self._hits_IT, self._predicted_IT, self.positives_I[:, None], self._totals_I[:, None])

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall (T,) of the pixels of all images at probability >= t / 255; NaN where undefined."""
        hits_T, predicted_T = self._hits_IT.sum(axis=0), self._predicted_IT.sum(axis=0)
        return ratio(hits_T, predicted_T), ratio(hits_T, np.full(NUM_LEVELS, self.positives_I.sum()))

    def metric(self, name: str) -> Metric:
        """A value of `SaliencyMetrics` as a function of image weights (I,), for the bootstrap.

        The weights are those of the images in the order of `image_ids`.
        """
        compute = partial(MEASURES[name], self)
        return lambda image_weights_I: compute(image_weights_I) if image_weights_I.any() else None

    @cached_property
    def _totals_I(self) -> np.ndarray:
        return self.histograms_I2T.sum(axis=(1, 2))

    @cached_property
    def _hits_IT(self) -> np.ndarray:
        return _from_above(self.histograms_I2T[:, 1])

    @cached_property
    def _predicted_IT(self) -> np.ndarray:
        return _from_above(self.histograms_I2T.sum(axis=1))

    @cached_property
    def _mirror_curves_2IT(self) -> np.ndarray:
        """Smoothed precision and recall of each image at probability > t / 255."""
        hits_IT, predicted_IT = (_strictly_above(pixels_IT) for pixels_IT in (self._hits_IT, self._predicted_IT))
        return smoothed_precision_recall(hits_IT, predicted_IT, self.positives_I[:, None])

    def _mean(self, name: str, weights_I: np.ndarray) -> float | None:
        values_I = self.columns[name]
        known_I = ~np.isnan(values_I)
        weights_I = weights_I[known_I]
        return float(_average(values_I[known_I], weights_I)) if weights_I.any() else None

    def _iou_pooled(self, weights_I: np.ndarray) -> float | None:
        hits, predicted, positives = (
            weights_I @ values for values in (self.columns["hits"], self.columns["predicted"], self.positives_I)
        )
        return number_or_none(float(ratio(hits, predicted + positives - hits)))

    def _f_max_mirror(self, weights_I: np.ndarray) -> float:
        return float(f_of(*(_average(values_IT, weights_I) for values_IT in self._mirror_curves_2IT)).max())


def _average(values: np.ndarray, weights_I: np.ndarray) -> np.ndarray:
    """Weighted mean over the first axis."""
    return weights_I.astype(np.float64) @ values / weights_I.sum()


def _from_above(pixels_IT: np.ndarray) -> np.ndarray:
    """Pixels at or above each level."""
    return pixels_IT[:, ::-1].cumsum(axis=1)[:, ::-1]


def _strictly_above(pixels_IT: np.ndarray) -> np.ndarray:
    return np.pad(pixels_IT[:, 1:], ((0, 0), (0, 1)))


def _of_curve(
    curves: str, summary: Callable[[np.ndarray], float], rows: SaliencyRows, weights_I: np.ndarray
) -> float | None:
    return float(summary(_average(getattr(rows, curves), weights_I)))


def _mean_of(name: str) -> Callable[[SaliencyRows, np.ndarray], float | None]:
    return lambda rows, weights_I: rows._mean(name, weights_I)


MEASURES: dict[str, Callable[[SaliencyRows, np.ndarray], float | None]] = {
    **{
        name: _mean_of(name)
        for name in ("mae", "s_measure", "weighted_f", "f_adaptive", "e_adaptive", "iou_per_image", "ber")
    },
    "e_max": partial(_of_curve, "e_curves_IT", np.max),
    "e_mean": partial(_of_curve, "e_curves_IT", np.mean),
    "f_max": partial(_of_curve, "f_curves_IT", np.max),
    "f_mean": partial(_of_curve, "f_curves_IT", np.mean),
    "f_max_mirror": SaliencyRows._f_max_mirror,
    "iou_pooled": SaliencyRows._iou_pooled,
}
"""Metric name -> its value for rows and image weights that are not all 0."""
