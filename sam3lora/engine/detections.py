"""The result of asking an image for a prompt, `Detections`, and its converters. No torch here, so that an HTTP front
end stays light."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sam3lora.data.masks import decode_mask
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_to_polygons


@dataclass(frozen=True)
class BoxPrompt:
    """A box that shows what is meant (`label` 1) or what is not (`label` 0), in pixels of the image."""

    xyxy: tuple[float, float, float, float]
    label: int = 1


@dataclass(eq=False)
class Detections:
    """What was found for one prompt in one image, by descending score.

    Attributes:
        presence: Probability in [0, 1] that the image shows the prompt at all.
        size_hw: Height and width of the image in pixels.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the image.
        rles: N compressed COCO RLEs `{"size": [height, width], "counts": str}` at the image's size, ready for JSON;
            None if masks were not wanted.
        num_before_nms: How many there were at the threshold before merging, suppression and the limit.
        image_HW3: uint8 (H, W, 3) RGB, the image, where the caller wants to draw on it; otherwise None.
        mask_logits_NHW: float32 (N, h, w), the masks as the model makes them, where the caller wants to correct them;
            otherwise None.
    """

    prompt: str
    presence: float
    size_hw: tuple[int, int]
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    rles: list[Rle] | None = field(repr=False)
    num_before_nms: int = 0
    image_HW3: np.ndarray | None = field(default=None, repr=False)
    mask_logits_NHW: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_detections(self) -> int:
        return len(self.scores)

    @cached_property
    def masks(self) -> np.ndarray:
        """bool (N, H, W) at the image's size, decoded when first asked for: a byte for each pixel of each detection.

        Raises:
            ValueError: Masks were not wanted.
        """
        rles = self._required_rles()
        masks_NHW = np.empty((len(rles), *self.size_hw), dtype=bool)
        for row, rle in enumerate(rles):
            masks_NHW[row] = decode_mask(rle, self.size_hw)
        return masks_NHW

    @property
    def areas_px(self) -> list[int]:
        """Pixels of each mask."""
        return [rle_area_px(rle) for rle in self._required_rles()]

    def polygons(self) -> list[list[list[float]]]:
        """For each detection its outer outlines `[x0, y0, x1, y1, ...]` in pixels; holes are lost."""
        return [rle_to_polygons(rle) for rle in self._required_rles()]

    def to_coco(self, image_id: int, category_id: int) -> list[dict[str, Any]]:
        """COCO results; the box is xywh in pixels, `segmentation` is there if masks were wanted."""
        results: list[dict[str, Any]] = []
        for row, (x0, y0, x1, y1) in enumerate(self.boxes_xyxy):
            result: dict[str, Any] = {"image_id": image_id, "category_id": category_id}
            if self.rles is not None:
                result["segmentation"] = self.rles[row]
            result["bbox"] = [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)]
            results.append(result | {"score": float(self.scores[row])})
        return results

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `area_px` and `mask` (RLE) are there if masks were wanted."""
        detections: list[dict[str, Any]] = [
            {"score": round(float(score), 6), "box_xyxy": [round(float(value), 2) for value in box]}
            for score, box in zip(self.scores, self.boxes_xyxy, strict=True)
        ]
        for detection, rle in zip(detections, self.rles or (), strict=False):
            detection |= {"area_px": rle_area_px(rle), "mask": rle}
        return {
            "prompt": self.prompt,
            "presence": round(self.presence, 6),
            "num_detections": len(self),
            "detections": detections,
        }

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, with the prompt as `data["class_name"]`; the package has to be installed.

        Raises:
            ImportError: supervision is not installed.
        """
        import supervision

        return supervision.Detections(
            xyxy=self.boxes_xyxy.astype(np.float32).reshape(-1, 4),
            mask=None if self.rles is None else self.masks,
            confidence=self.scores.astype(np.float32),
            class_id=np.zeros(len(self), dtype=int),
            data={"class_name": np.full(len(self), self.prompt, dtype=object)},
        )

    def _required_rles(self) -> list[Rle]:
        if self.rles is None:
            raise ValueError(f"the masks of {self.prompt!r} were not asked for: predict with masks=True")
        return self.rles
