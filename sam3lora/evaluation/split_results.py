"""One model's results on some images, with masks: what is matched to the ground truth, a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam3lora.engine.detections import Detections
from sam3lora.errors import UserError
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

    def split(self, image_ids: Sequence[int], size: int) -> Iterator[tuple[range, SplitResults]]:
        """The results of `size` images after `size` images, with their positions in `image_ids`.

        Raises:
            UserError: A result belongs to another image.
        """
        rows = {image_id: row for row, image_id in enumerate(image_ids)}
        parts = [SplitResults() for _ in range(0, len(rows), size)]
        for prediction in self.predictions:
            if prediction["image_id"] not in rows:
                raise UserError(foreign_result(prediction))
            parts[rows[prediction["image_id"]] // size].predictions.append(prediction)
        for pair, value in self.presence.items():
            parts[rows[pair[0]] // size].presence[pair] = value
        for number, part in enumerate(parts):
            part.num_before_nms = self.num_before_nms if number == 0 else 0
            yield range(number * size, min((number + 1) * size, len(rows))), part

    def add(self, image_id: int, category_id: int, detections: Detections) -> None:
        self.predictions += detections.to_coco(image_id, category_id)
        self.presence[image_id, category_id] = detections.presence
        self.num_before_nms += detections.num_before_nms


def foreign_result(prediction: Mapping[str, Any]) -> str:
    """What is wrong with a result of an image or a category that the ground truth lacks."""
    return (
        f"a prediction has image_id {prediction['image_id']!r} and category_id {prediction['category_id']!r}, which "
        "the ground truth lacks: it belongs to another split"
    )
