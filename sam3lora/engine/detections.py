"""What is asked and what is found, as plain values: no torch here, so that an HTTP front end stays light."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sam3lora.engine.mask_codes import Rle, rle_area_px
from sam3lora.errors import UserError


@dataclass(frozen=True)
class BoxPrompt:
    """A box that shows what is meant (`label` 1) or what is not (`label` 0), in pixels of the image."""

    xyxy: tuple[float, float, float, float]
    label: int = 1


@dataclass(frozen=True)
class PostProcessing:
    """How detections are made from object queries.

    Args:
        threshold: Lowest score kept, score = sigmoid(logit) x sigmoid(presence); 0 keeps all, which mAP needs.
        nms: Overlap of what decides that two detections are one object: "mask" (always after merging), "box", or
            "none" to keep both.
        nms_iou: Of two detections with a larger IoU only the better one stays.
        merge: Join overlapping detections into one instead: for cracks and other things without countable parts.
        merge_iou: Mask IoU from which detections are joined; who overlaps is joined, also by way of others.
        merge_threshold: Detections below it are not joined (they go through NMS); None joins all that are kept.
        max_detections: Most detections of a prompt in an image; the best ones stay.

    Raises:
        UserError: A value out of range.
    """

    threshold: float = 0.5
    nms: Literal["mask", "box", "none"] = "box"
    nms_iou: float = 0.5
    merge: bool = False
    merge_iou: float = 0.15
    merge_threshold: float | None = None
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name in ("threshold", "nms_iou", "merge_iou", "merge_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {value}")
        if self.nms not in ("mask", "box", "none"):
            raise UserError(f"nms must be mask, box or none, got {self.nms!r}")
        if self.max_detections < 1:
            raise UserError(f"max_detections must be positive, got {self.max_detections}")

    @property
    def needs_masks(self) -> bool:
        return self.merge or self.nms == "mask"

    def without_masks(self) -> PostProcessing:
        """The nearest that boxes alone allow."""
        return replace(self, merge=False, nms="box" if self.nms == "mask" else self.nms)


@dataclass
class Instances:
    """What was found for one prompt in one image, by descending score.

    Attributes:
        prompt: The prompt.
        presence: Probability in [0, 1] that the image shows the prompt at all.
        size_hw: Size of the original image in pixels.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the original image.
        masks: N compressed RLEs `{"size": [height, width], "counts": str}` at the original size, ready for JSON; empty
            if masks were not wanted.
        num_before_nms: How many there were at the threshold before merging, suppression and the limit.
    """

    prompt: str
    presence: float
    size_hw: tuple[int, int]
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    masks: list[Rle] = field(repr=False)
    num_before_nms: int = 0

    def __len__(self) -> int:
        return len(self.scores)

    def areas_px(self) -> list[int]:
        """Pixels of each mask."""
        return [rle_area_px(mask) for mask in self.masks]
