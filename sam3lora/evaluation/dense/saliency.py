"""Metrics of binary tasks on probability maps: S, E, F, weighted F, MAE, IoU and balanced error rate.

Each image leaves two histograms of its 8-bit probabilities, from which all curves over thresholds come, and the few
numbers that need its pixels.

Shapes: `I` images, `T` the 256 thresholds, `H` `W` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3lora.evaluation.dense.binary_image import DECISION, NUM_LEVELS, BinaryImage
from sam3lora.evaluation.dense.image_rows import ImageRows
from sam3lora.evaluation.dense.s_measure import s_measure
from sam3lora.evaluation.dense.saliency_rows import MEASURES, NUMBERS, SaliencyRows
from sam3lora.evaluation.dense.threshold_measures import e_measure, f_measure
from sam3lora.evaluation.dense.weighted_f import weighted_f


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
        self._numbers = ImageRows((len(NUMBERS),))
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
