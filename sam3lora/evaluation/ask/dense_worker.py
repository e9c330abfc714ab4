"""One worker of the evaluation of a dense model: it labels the images that it is given, and measures the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3lora.engine.dense import DenseEngine
from sam3lora.engine.dense_maps import label_maps, probability
from sam3lora.evaluation.ask.reading import Asked, read_images
from sam3lora.evaluation.ask.worker import facts_of
from sam3lora.evaluation.dense.map_files import ImageMaps
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.dense.split_meter import DenseMeter
from sam3lora.evaluation.dense.truth import true_labels


class DenseAnswers(NamedTuple):
    """What was counted on a batch of images, and the maps of each image by its id."""

    meter: DenseMeter
    maps: dict[int, ImageMaps]


class DenseWorker:
    """Loads a dense folder once; then one image after the other is measured at its own size.

    Args:
        folder: Of task dense.
        options: The other arguments of `DenseEngine.load`.
        keep_maps: Return the maps.
    """

    def __init__(
        self, folder: str, options: Mapping[str, Any], settings: DenseEvaluation, *, keep_maps: bool = True
    ) -> None:
        self._engine = DenseEngine.load(folder, **options)
        self._settings, self._keep_maps = settings, keep_maps
        self.model = settings.of_model(self._engine.settings)
        self.labels = true_labels(self._engine.metadata, self.model)

    def facts(self) -> dict[str, Any]:
        """The facts that the numbers depend on beside the settings."""
        return facts_of(self._engine)

    def ask(self, records: Sequence[Mapping[str, Any]]) -> Asked:
        """Label and measure the images of records of an index: `DenseAnswers`. Raises ImageError as `read_images`."""
        records, images, skipped = read_images(records, self._settings.on_bad_image)
        logits = self._engine.logits(images)
        meter = DenseMeter(self.model, self.labels, normalise=self._settings.paper_normalisation)
        maps = {
            record["image_id"]: self._measure(meter, record, logits_Nhw)
            for record, logits_Nhw in zip(records, logits, strict=True)
        }
        return Asked(DenseAnswers(meter, maps), skipped)

    def _measure(self, meter: DenseMeter, record: Mapping[str, Any], logits_Nhw: np.ndarray) -> ImageMaps:
        size_hw, mode = (record["height"], record["width"]), self.model.mode
        predicted_MHW = label_maps(logits_Nhw, size_hw, mode, self.model.threshold)
        probability_HW = probability(logits_Nhw, 0, size_hw, mode) if mode == "binary" else None
        meter.add(predicted_MHW, self.labels.of_record(record), probability_HW, image_id=record["image_id"])
        return ImageMaps.of(predicted_MHW, probability_HW) if self._keep_maps else ImageMaps([], None)
