"""One model's results on a split: collected in any order and any number of processes, then joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam3lora.engine.detections import Detections
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory

Pair = tuple[int, int]
"""(image id, category id)."""


@dataclass
class SplitResults:
    """Results of one model on some images.

    Attributes:
        predictions: COCO results at the original size: image_id, category_id, segmentation (compressed RLE), bbox
            (xywh in pixels), score. Post-processed, without a score cut.
        presence: (image id, category id) -> probability that the image shows it, for every pair that was asked.
        num_before_nms: Detections before suppression, merging and the limit.
    """

    predictions: list[dict[str, Any]] = field(default_factory=list, repr=False)
    presence: dict[Pair, float] = field(default_factory=dict, repr=False)
    num_before_nms: int = 0

    @classmethod
    def collect(
        cls,
        records: Sequence[Mapping[str, Any]],
        categories: Sequence[PromptedCategory],
        found: Sequence[Sequence[Detections]],
    ) -> SplitResults:
        """From the detections of each record's image for each category's prompt."""
        results = cls()
        for record, of_image in zip(records, found, strict=True):
            for category, detections in zip(categories, of_image, strict=True):
                results.add(record["image_id"], category.id, detections)
        return results

    def add(self, image_id: int, category_id: int, detections: Detections) -> None:
        self.predictions += detections.to_coco(image_id, category_id)
        self.presence[image_id, category_id] = detections.presence
        self.num_before_nms += detections.num_before_nms

    @classmethod
    def join(cls, parts: Iterable[SplitResults], image_ids: Sequence[int]) -> SplitResults:
        """All parts as one, in the order of `image_ids`, wherever they came from."""
        joined = cls()
        for part in parts:
            joined.predictions += part.predictions
            joined.presence |= part.presence
            joined.num_before_nms += part.num_before_nms
        position = {image_id: number for number, image_id in enumerate(image_ids)}
        joined.predictions.sort(key=lambda prediction: position[prediction["image_id"]])
        return joined
