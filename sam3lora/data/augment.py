"""The position of an image in the model's square frame, and the image placed there.

SAM 3 is trained on images resized to a random square (the aspect ratio is not kept) and put at a random place on black;
it is evaluated on the full frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sam3lora.data.images import resize_image

Augmentation = Literal["none", "sam3"]

# facebookresearch/sam3, fine-tuning configurations: sides of the random square resize for a frame of 1008 pixels
SAM3_SIDES = tuple(range(480, 1009, 32))
SAM3_FRAME = 1008


@dataclass(frozen=True)
class Placement:
    """The image's square in the frame, in units of the frame's side: `x' = offset + scale * x`, after mirroring
    left to right if `flip`, and top to bottom if `flip_vertical`."""

    scale: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0
    flip: bool = False
    flip_vertical: bool = False

    @property
    def is_full_frame(self) -> bool:
        return self.scale == 1.0 and self.offset_x == 0.0 and self.offset_y == 0.0

    def map_points(self, points_xy: np.ndarray) -> np.ndarray:
        """Points (N, 2) relative to the image -> relative to the frame.

        >>> Placement(scale=0.5, offset_x=0.25, flip=True).map_points(np.array([[0.0, 1.0]])).tolist()
        [[0.75, 0.5]]
        """
        x, y = points_xy[:, 0], points_xy[:, 1]
        x = 1.0 - x if self.flip else x
        y = 1.0 - y if self.flip_vertical else y
        return np.stack([self.offset_x + self.scale * x, self.offset_y + self.scale * y], axis=1)

    def map_boxes(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) xyxy relative to the image -> relative to the frame."""
        first, second = self.map_points(boxes_xyxy[:, :2]), self.map_points(boxes_xyxy[:, 2:])
        return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)


def choose_placement(
    resolution: int,
    rng: np.random.Generator,
    *,
    augmentation: Augmentation = "none",
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
) -> Placement:
    """Draw a placement in a frame of `resolution` pixels; how often `rng` is asked depends on the settings only.

    "none" fills the frame, "sam3" is SAM 3's random square resize and offset, which does not mirror.
    """
    flip = bool(rng.random() < horizontal_flip)
    flip_vertical = vertical_flip > 0 and bool(rng.random() < vertical_flip)
    if augmentation == "none":
        return Placement(flip=flip, flip_vertical=flip_vertical)
    assert augmentation == "sam3", augmentation
    side = max(1, round(int(rng.choice(SAM3_SIDES)) * resolution / SAM3_FRAME))
    left, top = (int(v) for v in rng.integers(0, resolution - side, size=2, endpoint=True))
    return Placement(side / resolution, left / resolution, top / resolution, flip, flip_vertical)


def place_image(image: np.ndarray, placement: Placement, resolution: int) -> np.ndarray:
    """Image uint8 (H, W, 3) -> frame uint8 (S, S, 3), black outside the image's square."""
    side = round(placement.scale * resolution)
    resized = resize_image(image, (side, side))
    if placement.flip:
        resized = resized[:, ::-1]
    if placement.flip_vertical:
        resized = resized[::-1]
    if side == resolution:
        return np.ascontiguousarray(resized)
    left, top = round(placement.offset_x * resolution), round(placement.offset_y * resolution)
    frame = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    frame[top : top + side, left : left + side] = resized
    return frame
