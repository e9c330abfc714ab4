"""`MaskCleaning`: small holes and stray specks taken out of a mask that a click head made. No torch here.

The options are those of SAM 2's image predictor, https://github.com/facebookresearch/sam2 . They change the mask that
is shown. The logits that the next click starts from stay as they are.

Shapes: `H` `W` pixels of the low-resolution mask, `P` parts of it; part 0 is everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from sam3lora.engine.clicks.click import Click
from sam3lora.errors import UserError

MAX_AREA = 10_000
"""Largest limit: an eighth of SAM 3's mask, more than the whole mask of the tiny model."""
_INSIDE, _OUTSIDE = 1.0, -1.0
"""Logits of a filled hole and of a speck that is taken out.

Any other size gives the same enlarged mask: all neighbours of a part, across corners too, are on the same side of 0 as
its new logits, so every value interpolated between them is.
"""


@dataclass(frozen=True)
class MaskCleaning:
    """Up to which area holes are filled and specks are taken out; 0 leaves them.

    Areas are in pixels of the low-resolution mask, each of which is 3.5 x 3.5 pixels of the model's input. A hole is
    background that the mask encloses; a notch at the image's border is none. A speck is a part of the mask that does
    not touch the rest. Pixels that meet at a corner touch.

    Attributes:
        max_hole_area: Of a hole that is filled. One with a click of label 0 stays.
        max_sprinkle_area: Of a speck that is taken out. One with a click of label 1 stays, and so does the largest part
            of the mask, or the largest ones of equal area.

    Raises:
        UserError: An area is no whole number, or out of range.
    """

    max_hole_area: int = 0
    max_sprinkle_area: int = 0

    def __post_init__(self) -> None:
        for name in ("max_hole_area", "max_sprinkle_area"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value <= MAX_AREA:
                raise UserError(
                    f"{name} must be a whole number of pixels of the low-resolution mask from 0 (off) to {MAX_AREA}, "
                    f"got {repr(value)[:60]}"
                )
            object.__setattr__(self, name, int(value))  # JSON takes no numbers of numpy

    def clean(self, logits_HW: np.ndarray, clicks: Sequence[Click], size_hw: tuple[int, int]) -> np.ndarray:
        """The logits without small holes and specks; the same array if nothing is to be done.

        Holes are filled first: a speck in a filled hole belongs to the object.

        Args:
            logits_HW: float, above 0 inside.
            clicks: All clicks on the object, in pixels of the image.
            size_hw: Height and width of the image in pixels.
        """
        if self.max_hole_area:
            parts_HW, area_P = _parts(logits_HW <= 0)
            at_border = np.concatenate([parts_HW[0], parts_HW[-1], parts_HW[:, 0], parts_HW[:, -1]])
            kept = np.append(at_border, _clicked(parts_HW, clicks, 0, size_hw))
            logits_HW = _with_parts(logits_HW, parts_HW, area_P <= self.max_hole_area, kept, _INSIDE)
        if self.max_sprinkle_area:
            parts_HW, area_P = _parts(logits_HW > 0)
            largest = np.flatnonzero(area_P == area_P.max())
            kept = np.append(largest, _clicked(parts_HW, clicks, 1, size_hw))
            logits_HW = _with_parts(logits_HW, parts_HW, area_P <= self.max_sprinkle_area, kept, _OUTSIDE)
        return logits_HW


AS_IT_IS = MaskCleaning()
"""Leaves every mask as the head made it."""


def _parts(mask_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the part that each pixel is in, and the area of each part (P,), 0 for what is in none."""
    _, parts_HW, stats_P5, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    area_P = stats_P5[:, cv2.CC_STAT_AREA]
    area_P[0] = 0
    return parts_HW, area_P


def _clicked(parts_HW: np.ndarray, clicks: Iterable[Click], label: int, size_hw: tuple[int, int]) -> np.ndarray:
    """Numbers of the parts under clicks of this label, 0 for none: of the four pixels around the place of each."""
    found = [np.zeros(0, dtype=parts_HW.dtype)]
    for click in clicks:
        if click.label == label:
            y, x = (
                max(int((at + 0.5) * small / large - 0.5), 0)
                for at, small, large in zip((click.y, click.x), parts_HW.shape, size_hw, strict=True)
            )
            found.append(parts_HW[y : y + 2, x : x + 2].ravel())
    return np.concatenate(found)


def _with_parts(
    logits_HW: np.ndarray, parts_HW: np.ndarray, is_small_P: np.ndarray, kept: np.ndarray, value: float
) -> np.ndarray:
    """The logits with this value in the small parts that are not kept."""
    is_small_P = is_small_P.copy()
    is_small_P[0] = False
    is_small_P[kept] = False
    return np.where(is_small_P[parts_HW], np.float32(value), logits_HW) if is_small_P.any() else logits_HW
