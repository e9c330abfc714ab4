"""What a prompt found in an image, for people, for pictures and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.masks import decode_mask
from sam3lora.engine.detections import Instances
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_to_polygons
from sam3lora.errors import UserError
from sam3lora.inference.drawing import PALETTE_RGB, Marked, draw_instances, encode_image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_LABELS = 20  # of a picture: more would hide what they name


@dataclass(frozen=True, eq=False)
class PromptResult:
    """Detections of one prompt in one image, by descending score.

    Attributes:
        prompt: The prompt.
        presence: Probability in [0, 1] that the image shows the prompt at all.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the image.
        rles: N compressed COCO RLEs `{"size": [height, width], "counts": str}`; None if masks were not wanted.
        num_before_nms: How many there were at the threshold before merging, suppression and the limit.
        image_HW3: uint8 (H, W, 3), RGB, that was asked.
    """

    prompt: str
    presence: float
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    rles: list[Rle] | None = field(repr=False)
    num_before_nms: int
    image_HW3: np.ndarray = field(repr=False)

    @classmethod
    def from_instances(cls, found: Instances, image_HW3: np.ndarray, *, masks: bool = True) -> PromptResult:
        rles = found.masks if masks else None
        return cls(found.prompt, found.presence, found.scores, found.boxes_xyxy, rles, found.num_before_nms, image_HW3)

    @property
    def num_detections(self) -> int:
        return len(self.scores)

    @property
    def size_hw(self) -> tuple[int, int]:
        height, width = self.image_HW3.shape[:2]
        return height, width

    @cached_property
    def masks(self) -> np.ndarray:
        """bool (N, H, W) at the image's size, decoded when first asked for: a byte a pixel of each detection."""
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

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `area_px` and `mask` (RLE) are there if masks were wanted."""
        detections: list[dict[str, Any]] = [
            {"score": round(float(score), 6), "box_xyxy": [round(float(value), 2) for value in box]}
            for score, box in zip(self.scores, self.boxes_xyxy, strict=True)
        ]
        for detection, rle in zip(detections, self.rles or (), strict=False):
            detection |= {"area_px": rle_area_px(rle), "mask": rle}
        return {
            "prompt": self.prompt,
            "presence": round(self.presence, 6),
            "num_detections": self.num_detections,
            "detections": detections,
        }

    def _required_rles(self) -> list[Rle]:
        if self.rles is None:
            raise ValueError(f"the masks of {self.prompt!r} were not asked for: predict with masks=True")
        return self.rles


def draw_results(
    results: Sequence[PromptResult], *, show_boxes: bool = False, show_masks: bool = True, show_labels: bool = True
) -> np.ndarray:
    """The image with what its prompts found; one colour a prompt, or one a detection if there is a single prompt.

    Args:
        results: Of one image.
        show_boxes: Draw the boxes.
        show_masks: Draw the masks, if there are any.
        show_labels: Write prompt and score of the best detections, equally many of each prompt and about 20 in all.

    Returns:
        uint8 (k H, k W, 3), RGB; small images are enlarged by a whole factor k, so that labels can be read.
    """
    if not results or any(result.image_HW3 is not results[0].image_HW3 for result in results):
        raise ValueError(f"expected the results of one image, got {len(results)} of {_num_images(results)} images")
    marked, colours = [], []
    num_labelled = max(1, MAX_LABELS // len(results))
    for number, result in enumerate(results):
        rles = result.rles if show_masks and result.rles is not None else [None] * result.num_detections
        for row, (score, box, rle) in enumerate(zip(result.scores, result.boxes_xyxy, rles, strict=True)):
            label = f"{result.prompt} {score:.2f}" if row < num_labelled else ""
            marked.append(Marked(label, rle, tuple(box.tolist())))
            colours.append(PALETTE_RGB[(number if len(results) > 1 else row) % len(PALETTE_RGB)])
    return draw_instances(
        results[0].image_HW3,
        marked,
        colours_rgb=colours or PALETTE_RGB,
        show_masks=show_masks,
        show_boxes=show_boxes,
        show_labels=show_labels,
    )


def check_picture_path(path: str | Path) -> None:
    """Whether a picture can be written there, as far as the name says.

    Raises:
        UserError: It names no image format.
    """
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"cannot write a picture to {path}: its name must end in {', '.join(PICTURE_SUFFIXES)}")


def write_picture(path: str | Path, picture_HW3: np.ndarray) -> None:
    """Write RGB pixels in the format that the path's ending names; missing folders are made.

    Raises:
        UserError: It names no image format, or the file cannot be written.
    """
    check_picture_path(path)
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(picture_HW3, ".jpg" if suffix == ".jpeg" else suffix))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _num_images(results: Sequence[PromptResult]) -> int:
    return len({id(result.image_HW3) for result in results})
