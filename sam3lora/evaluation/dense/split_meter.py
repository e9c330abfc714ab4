"""`DenseMeter`: all that is measured of a dense model on a set of images, one image at a time.

Shapes: `I` images, `M` label maps of an image (one, or one for each class that may overlap others), `H` `W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sam3lora.data.label_maps import LabelMaps
from sam3lora.evaluation.dense.boundary import BoundaryIou
from sam3lora.evaluation.dense.class_counts import Counts, ratio
from sam3lora.evaluation.dense.confusion import ConfusionMatrix
from sam3lora.evaluation.dense.label_meter import LabelMeter, mean_of_known
from sam3lora.evaluation.dense.saliency import MEASURES, SaliencyMeter
from sam3lora.label_values import IGNORE
from sam3lora.model.dense.settings import DenseSettings

LABEL_MEASURES = ("mean_iou", "mean_iou_foreground", "pixel_accuracy", "frequency_weighted_iou")
BOUNDARY_MEASURES = {"boundary_iou": "mean", "boundary_iou_foreground": "mean_foreground"}


class DenseMeter:
    """Measures label maps, and in mode binary probabilities.

    Args:
        settings: Of the model, with the threshold to use.
        labels: Which value each category has in the truth.
        normalise: See `SaliencyMeter`.
    """

    def __init__(self, settings: DenseSettings, labels: LabelMaps, *, normalise: bool = False) -> None:
        self.labels = LabelMeter(settings, labels)
        self.boundaries = [BoundaryIou(names) for names in settings.names_of_maps]
        self.saliency = SaliencyMeter(normalise=normalise) if settings.mode == "binary" else None

    @property
    def class_names(self) -> list[str]:
        """The classes, the background first unless every class has a map of its own."""
        if len(self.matrices) == 1:
            return self.matrices[0].class_names
        return [matrix.class_names[1] for matrix in self.matrices]

    @property
    def matrices(self) -> list[ConfusionMatrix]:
        return self.labels.matrices

    @property
    def image_ids(self) -> list[int]:
        """The images in the order of all `I`."""
        return self.matrices[0].counts.image_ids

    def add(
        self, predicted_MHW: np.ndarray, truth_MHW: np.ndarray, probability_HW: np.ndarray | None, *, image_id: int
    ) -> None:
        """Measure one image at its own size.

        Args:
            predicted_MHW, truth_MHW: Label maps, uint8.
            probability_HW: Of the foreground, in mode binary. An image whose pixels are all ignored has no part there.
        """
        self.labels.add_maps(predicted_MHW, truth_MHW, image_id=image_id)
        for boundary, predicted_HW, truth_HW in zip(self.boundaries, predicted_MHW, truth_MHW, strict=True):
            boundary.add(predicted_HW, truth_HW, image_id=image_id)
        if self.saliency is not None and probability_HW is not None and (truth_MHW[0] != IGNORE).any():
            self.saliency.add(probability_HW, truth_MHW[0], image_id=image_id)

    def merge(self, other: DenseMeter) -> None:
        """Add what another worker measured on other images."""
        self.labels.merge(other.labels)
        for own, theirs in zip(self.boundaries, other.boundaries, strict=True):
            own.merge(theirs)
        if self.saliency is not None and other.saliency is not None:
            self.saliency.merge(other.saliency)

    def values(self) -> dict[str, float | None]:
        """Each measure over all images."""
        matrices = [matrix.values() for matrix in self.matrices]
        boundaries = [boundary.values() for boundary in self.boundaries]
        found = {name: mean_of_known(getattr(one, name) for one in matrices) for name in LABEL_MEASURES}
        for name, own in BOUNDARY_MEASURES.items():
            found[name] = mean_of_known(getattr(one, own) for one in boundaries)
        if self.saliency is not None:
            measured = self.saliency.values()
            found |= {name: getattr(measured, name) for name in MEASURES}
        return found

    def label_metrics(self) -> Callable[[np.ndarray], dict[str, float | None]]:
        """Measures of label maps, and `iou/CLASS` of each class, of image weights (I,), for the bootstrap."""
        parts = [matrix.all_metrics() for matrix in self.matrices]
        boundaries = [boundary.mean_metric() for boundary in self.boundaries]

        def measure(image_weights_I: np.ndarray) -> dict[str, float | None]:
            found = [part(image_weights_I) for part in parts]
            values = {name: mean_of_known(one[name] for one in found) for name in LABEL_MEASURES}
            values["boundary_iou"] = mean_of_known(boundary(image_weights_I) for boundary in boundaries)
            known = {name: iou for one in found for name, iou in one.items()}
            return values | {f"iou/{name}": known[f"iou/{name}"] for name in self.class_names}

        return measure

    def foreground_counts(self) -> Counts:
        """Pixels (I, K) of every class but the background in each image."""
        each = [matrix.counts.per_image()[:, :, 1:] for matrix in self.matrices]
        return Counts(*np.moveaxis(np.concatenate(each, axis=2), 1, 0))

    def quality(self) -> np.ndarray:
        """Mean IoU (I,) of the classes that occur in each image, the background aside; NaN where none does."""
        iou_IK = self.foreground_counts().iou()
        known_IK = ~np.isnan(iou_IK)
        return ratio(np.nansum(iou_IK, axis=1), known_IK.sum(axis=1))

    def empty_images(self) -> tuple[int, int]:
        """Number of images without a pixel of any class, and how many of these got one all the same."""
        counts = self.foreground_counts()
        is_empty_I = counts.truth.sum(axis=1) == 0
        return int(is_empty_I.sum()), int((is_empty_I & (counts.prediction.sum(axis=1) > 0)).sum())

    def notes(self) -> Iterator[str]:
        """Why values are None, and what was left out."""
        for matrix in self.matrices:
            yield from matrix.values().notes
        if self.saliency is not None:
            yield from self.saliency.values().notes
            if left_out := len(self.image_ids) - len(self.saliency.image_ids):
                yield f"measures of probabilities leave out {left_out} image(s) of which every pixel is ignored"
