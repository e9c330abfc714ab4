"""`Click`: a point that says "this belongs to the object" or "this does not". No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sam3lora.errors import UserError

BoxXyxy = tuple[float, float, float, float]

ClicksVision = Literal["adapter", "base"]
"""Whose trunk clicks see: the adapter's, or the base's, which the click head was trained on."""


@dataclass(frozen=True, slots=True)
class Click:
    """A point in pixels of the image, (0, 0) being the pixel at the top left.

    Attributes:
        label: 1 if the point belongs to the object, 0 if it does not.

    Raises:
        UserError: A coordinate is not finite, or the label is neither 0 nor 1.
    """

    x: float
    y: float
    label: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.x) and math.isfinite(self.y)):
            raise UserError(f"{self}: expected finite x and y in pixels of the image")
        if self.label not in (0, 1):
            raise UserError(f"{self}: expected label 1 (belongs to the object) or 0 (does not)")

    def __str__(self) -> str:
        return f"click x={self.x:g} y={self.y:g} label={self.label:g}"


def checked_clicks(clicks: Iterable[Click | Sequence[float]], size_hw: tuple[int, int]) -> tuple[Click, ...]:
    """Clicks, or (x, y) and (x, y, label), that lie inside an image.

    >>> checked_clicks([(5, 2), (0, 9, 0)], (10, 20))
    (Click(x=5, y=2, label=1), Click(x=0, y=9, label=0))

    Raises:
        UserError: A click has another number of values, a value out of range, or lies outside of the image.
    """
    height, width = size_hw
    checked = []
    for number, given in enumerate(clicks, start=1):
        if isinstance(given, Click):
            click = given
        elif len(given) in (2, 3):
            click = Click(*given)  # type: ignore[arg-type]
        else:
            raise UserError(f"click {number}: expected x, y and a label of 1 or 0, got {list(given)}")
        if not (0 <= click.x < width and 0 <= click.y < height):
            raise UserError(
                f"{click} lies outside of the image of {width} x {height} pixels: "
                f"expected 0 <= x < {width} and 0 <= y < {height}"
            )
        checked.append(click)
    return tuple(checked)


def checked_box(xyxy: Sequence[float], size_hw: tuple[int, int]) -> BoxXyxy:
    """A box x0 y0 x1 y1 in pixels that has an area and lies inside an image.

    Raises:
        UserError: It does not.
    """
    height, width = size_hw
    box = tuple(float(value) for value in xyxy)
    if len(box) == 4 and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height:
        return box
    raise UserError(
        f"box {list(xyxy)}: expected x0 y0 x1 y1 in pixels with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
    )
