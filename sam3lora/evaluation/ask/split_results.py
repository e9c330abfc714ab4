"""What a model says about the images of a split: collected in any order, in any number of places, then joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sam3lora.data.images import read_image
from sam3lora.engine.detections import Instances
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory

Pair = tuple[int, int]
"""(image id, category id)."""


@dataclass
class Answers:
    """Answers of one model to some images.

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
        found: Sequence[Sequence[Instances]],
    ) -> Answers:
        """What was found in each record's image for each category's prompt."""
        answers = cls()
        for record, of_image in zip(records, found, strict=True):
            for category, instances in zip(categories, of_image, strict=True):
                answers.add(record["image_id"], category.id, instances)
        return answers

    def add(self, image_id: int, category_id: int, instances: Instances) -> None:
        """Note what was found for one category in one image."""
        self.predictions += coco_results(instances, image_id, category_id)
        self.presence[image_id, category_id] = instances.presence
        self.num_before_nms += instances.num_before_nms

    @classmethod
    def join(cls, parts: Iterable[Answers], image_ids: Sequence[int]) -> Answers:
        """All parts as one, in the order of `image_ids`, wherever they came from."""
        joined = cls()
        for part in parts:
            joined.predictions += part.predictions
            joined.presence |= part.presence
            joined.num_before_nms += part.num_before_nms
        position = {image_id: number for number, image_id in enumerate(image_ids)}
        joined.predictions.sort(key=lambda prediction: position[prediction["image_id"]])
        return joined


def coco_results(instances: Instances, image_id: int, category_id: int) -> list[dict[str, Any]]:
    """Detections as COCO results; the box is xywh in pixels."""
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": mask,
            "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": float(score),
        }
        for mask, score, (x0, y0, x1, y1) in zip(instances.masks, instances.scores, instances.boxes_xyxy, strict=True)
    ]


def read_images(records: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The records' images, at the size that the annotations refer to.

    Raises:
        ImageError: An image cannot be read.
    """
    return [read_image(record["path"], expected_size_hw=(record["height"], record["width"])) for record in records]
