"""Metrics of binary tasks on probability maps: S, E, F, weighted F, MAE, IoU and balanced error rate.

Each image leaves two histograms of its 8-bit probabilities, from which all curves over thresholds come, and the few
numbers that need its pixels.

Shapes: `I` images, `T` the 256 thresholds, `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from sam3lora.evaluation.dense.binary_image import DECISION, NUM_LEVELS, BinaryImage
from sam3lora.evaluation.dense.class_counts import number_or_none, ratio
from sam3lora.evaluation.dense.image_rows import ImageRows
from sam3lora.evaluation.dense.s_measure import s_measure
from sam3lora.evaluation.dense.threshold_measures import (
    balanced_error,
    e_measure,
    f_measure,
    f_of,
    intersection_over_union,
    smoothed_precision_recall,
)
from sam3lora.evaluation.dense.weighted_f import weighted_f
from sam3lora.evaluation.metrics.bootstrap import Metric

_NUMBERS = ("mae", "s_measure", "weighted_f", "f_adaptive", "e_adaptive", "hits", "predicted")  # of an image


@dataclass(frozen=True)
class SaliencyMetrics:
    """Metrics of probability maps over a set: means over images unless said, in [0, 1], None without an image.

    Attributes:
        mae: Mean absolute error; the smaller the better.
        s_measure: Structure measure, in `s_measure.py`.
        e_max, e_mean: Greatest and mean value, over 256 thresholds, of the mean E measure. A perfect map of P pixels
            has P / (P - 1), slightly more than 1.
        e_adaptive: E measure at twice the image's mean probability, at most 1.
        f_max, f_mean, f_adaptive: The same of the F measure, with precision weighted by beta^2 = 0.3.
        f_max_mirror: F as papers on mirrors have it; see `smoothed_precision_recall`.
        weighted_f: In `weighted_f.py`.
        iou_per_image: Mean intersection over union at probability 0.5; 1 for an image without foreground in both.
        iou_pooled: The same of the pixels of all images together; None if no image has any foreground.
        ber: Balanced error rate at 0.5; the smaller the better. Images of one class are left out, None if all are.
        notes: Which values are None, and what was left out.
    """

    num_images: int
    mae: float | None
    s_measure: float | None
    e_max: float | None
    e_mean: float | None
    e_adaptive: float | None
    f_max: float | None
    f_mean: float | None
    f_adaptive: float | None
    f_max_mirror: float | None
    weighted_f: float | None
    iou_per_image: float | None
    iou_pooled: float | None
    ber: float | None
    notes: list[str]


class SaliencyMeter:
    """Measures probability maps against binary truths, one image at a time.

    Args:
        normalise: Stretch each map to [0, 1] first, to compare with papers that do. IoU and balanced error rate at 0.5
            are always those of the map as it is.
    """

    def __init__(self, *, normalise: bool = False) -> None:
        self.normalise = normalise
        self._numbers = ImageRows((len(_NUMBERS),))
        self._histograms = ImageRows((2, NUM_LEVELS), np.int64)

    @property
    def image_ids(self) -> list[int]:
        return self._numbers.image_ids

    def add(self, prediction_HW: np.ndarray, truth_HW: np.ndarray, *, image_id: int) -> None:
        """Measure an image at its original size.

        Args:
            prediction_HW: Probability of the foreground, floating point in [0, 1], or uint8 (times 255, rounded down).
            truth_HW: bool, or 0, 1 and 255 for pixels that count nowhere.
            image_id: Once in the set.

        Raises:
            ValueError: The image was measured before, is ignored as a whole, the sizes differ, or a value is out of
                range.
        """
        image = BinaryImage.of(prediction_HW, truth_HW)
        if not image.labels.size:
            raise ValueError(f"expected a pixel that counts, got image {image_id} with none: leave it out")
        decided = image.counts_from(DECISION)
        if self.normalise:
            image = image.stretched()
        hits, predicted = image.counts_from(min(2 * image.values.mean(), 1.0))
        positives, total = int(image.labels.sum()), image.labels.size
        row = (
            image.error_HW.sum() / total,
            s_measure(image),
            weighted_f(image),
            f_measure(hits, predicted, positives),
            e_measure(hits, predicted, positives, total),
            *decided,
        )
        self._numbers.add(image_id, np.array(row, dtype=np.float64))
        self._histograms.add(image_id, image.histograms())

    def merge(self, other: SaliencyMeter) -> None:
        """Add what another worker measured on other images.

        Raises:
            ValueError: Only one side is normalised, or an image was measured on both sides.
        """
        if self.normalise != other.normalise:
            raise ValueError("expected maps that are normalised alike on both sides, got normalised and plain ones")
        self._numbers.merge(other._numbers)
        self._histograms.merge(other._histograms)

    def rows(self) -> SaliencyRows:
        """The images measured so far, as columns."""
        return SaliencyRows(self.image_ids, self._numbers.stacked(), self._histograms.stacked())

    def values(self) -> SaliencyMetrics:
        rows = self.rows()
        num_images = len(rows.image_ids)
        weights_I = np.ones(num_images)
        left_out = int(np.isnan(rows.columns["ber"]).sum())
        notes = []
        if not num_images:
            notes.append("no image was measured")
        elif left_out:
            notes.append(f"ber: leaves out {left_out} of {num_images} images, which lack foreground or background")
        if num_images and not rows.positives_I.any() and not rows.columns["predicted"].any():
            notes.append("iou_pooled: neither the truth nor a prediction has any foreground")
        return SaliencyMetrics(
            num_images=num_images,
            notes=notes,
            **{name: rows.metric(name)(weights_I) for name in MEASURES},
        )


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
        columns = dict(zip(_NUMBERS, self.numbers_IN.T, strict=True))
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
