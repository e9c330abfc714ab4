"""`Click`: a point that says "this belongs to the object" or "this does not". No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np

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
        UserError: A coordinate is no finite number, or the label is neither 0 nor 1.
    """

    x: float
    y: float
    label: int = 1

    def __post_init__(self) -> None:
        if not (_is_finite(self.x) and _is_finite(self.y)):
            raise UserError(f"{self}: expected finite x and y in pixels of the image")
        if not (isinstance(self.label, Real | np.bool_) and self.label in (0, 1)):
            raise UserError(f"{self}: expected label 1 (belongs to the object) or 0 (does not)")
        for name in ("x", "y"):
            if isinstance(value := getattr(self, name), np.generic):
                object.__setattr__(self, name, value.item())  # JSON takes no numbers of numpy
        object.__setattr__(self, "label", int(self.label))

    def __str__(self) -> str:
        return f"click x={_short(self.x)} y={_short(self.y)} label={_short(self.label)}"


def checked_clicks(clicks: Iterable[Click | Sequence[float]], size_hw: tuple[int, int]) -> tuple[Click, ...]:
    """Clicks, or (x, y) and (x, y, label), that lie inside an image.

    >>> checked_clicks([(5, 2), (0, 9, 0)], (10, 20))
    (Click(x=5, y=2, label=1), Click(x=0, y=9, label=0))

    Raises:
        UserError: They are no list, a click has another number of values, a value out of range, or lies outside of the
            image.
    """
    height, width = size_hw
    if isinstance(clicks, str | Click) or not isinstance(clicks, Iterable):
        raise UserError(f"expected a list of clicks such as [(120, 80, 1)], got {clicks!r}")
    checked = []
    for number, given in enumerate(clicks, start=1):
        if isinstance(given, Click):
            click = given
        elif isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) and len(given) in (2, 3):
            click = Click(*given)  # type: ignore[arg-type]
        else:
            raise UserError(f"click {number}: expected (x, y) or (x, y, label) with a label of 1 or 0, got {given!r}")
        if not (0 <= click.x < width and 0 <= click.y < height):
            raise UserError(
                f"{click} lies outside of the image of {width} x {height} pixels: "
                f"expected 0 <= x < {width} and 0 <= y < {height}"
            )
        checked.append(click)
    return tuple(checked)


def refuse_only_outside(clicks: Iterable[Click]) -> None:
    """For an object that no box and no mask shows.

    Raises:
        UserError: Every click says what does not belong to it.
    """
    if not any(click.label for click in clicks):
        raise UserError("all clicks say what does not belong to the object: add one with label 1, or a box")


def checked_box(xyxy: Sequence[float], size_hw: tuple[int, int]) -> BoxXyxy:
    """A box x0 y0 x1 y1 in pixels that has an area and lies inside an image.

    Raises:
        UserError: It does not.
    """
    height, width = size_hw
    given = list(xyxy) if isinstance(xyxy, Iterable) else [xyxy]
    if len(given) == 4 and all(map(_is_finite, given)):
        x0, y0, x1, y1 = map(float, given)
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
            return x0, y0, x1, y1
    shown = ", ".join(map(_short, given))
    raise UserError(
        f"box [{shown}]: expected x0 y0 x1 y1 in pixels with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
    )


def _is_finite(value: object) -> bool:
    """Whether it is a number that a pixel may have; True is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    return f"{float(value):g}" if _is_finite(value) else repr(value)[:60]  # type: ignore[arg-type]
