"""Small holes and specks of masks drawn by hand: which go, which stay, and what becomes of them at full size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MAX_AREA, MaskCleaning
from sam3lora.engine.mask_codes import encode_logits, rle_box_xyxy
from sam3lora.errors import UserError

SIZE_HW = (100, 200)
"""Of the image: a pixel of the drawings below is 10 x 20 pixels of it."""
DRAWN = """
. . . . . . . . . .
. # # # # # . . . #
. # . # # # . . . .
. # # # # # . . # .
. # # . . # . . # .
. # # # # # . . . .
. # . # # # . . . .
. # # # # # . . . .
. # # # # # . . . .
. . . . . . . . . .
"""
"""Holes of 1, 2 and 1 pixels, a speck of 1 at the right border that meets none, and one of 2."""


def logits_of(drawn: str) -> np.ndarray:
    return np.array([[3.0 if one == "#" else -2.0 for one in row.split()] for row in drawn.split("\n") if row], "f4")


def drawing(logits: np.ndarray) -> str:
    return "\n" + "".join(" ".join(".#"[int(one > 0)] for one in row) + "\n" for row in logits)


def cleaned(drawn: str, holes: int = 0, specks: int = 0, *clicks: Click) -> str:
    return drawing(MaskCleaning(holes, specks).clean(logits_of(drawn), clicks, SIZE_HW))


def with_pixels(drawn: str, pixels: dict[tuple[int, int], str]) -> str:
    rows = [row.split() for row in drawn.split("\n") if row]
    for (row, column), value in pixels.items():
        rows[row][column] = value
    return "\n" + "".join(" ".join(row) + "\n" for row in rows)


SPECK_1 = {(1, 9): "."}
SPECKS = SPECK_1 | {(3, 8): ".", (4, 8): "."}
HOLES_1 = {(2, 2): "#", (6, 2): "#"}
HOLES = HOLES_1 | {(4, 3): "#", (4, 4): "#"}


@pytest.mark.parametrize(
    ("holes", "specks", "changed"),
    [
        (0, 0, {}),
        (1, 0, HOLES_1),
        (2, 0, HOLES),
        (MAX_AREA, 0, HOLES),  # the background outside is no hole
        (0, 1, SPECK_1),
        (0, 2, SPECKS),
        (0, MAX_AREA, SPECKS),  # the largest part stays, however large the limit
        (1, 2, HOLES_1 | SPECKS),
    ],
)
def test_what_goes_and_what_stays(holes: int, specks: int, changed: dict):
    assert cleaned(DRAWN, holes, specks) == with_pixels(DRAWN, changed)


def test_nothing_to_do_is_the_same_array():
    logits = logits_of(DRAWN)
    before = logits.copy()
    assert AS_IT_IS.clean(logits, (), SIZE_HW) is logits
    assert MaskCleaning(2, 2).clean(logits, (), SIZE_HW) is not logits
    assert np.array_equal(logits, before)  # what a next click starts from
    for empty in (np.full((4, 4), -1.0, "f4"), np.ones((4, 4), "f4"), np.zeros((4, 4), "f4"), np.ones((1, 1), "f4")):
        assert MaskCleaning(9, 9).clean(empty, (Click(1, 1),), (8, 8)) is empty


def test_a_notch_at_the_border_is_no_hole():
    notched = """
# # . # #
# # # # #
. # # . #
# # # # #
"""
    assert cleaned(notched, 4) == with_pixels(notched, {(2, 3): "#"})


def test_pixels_that_meet_at_a_corner_belong_together():
    diagonal = """
. . . . . . .
. # # # # # .
. # . # # # .
. # # . # # .
. # # # # . .
. # # # # . #
. . . . . # .
"""
    assert cleaned(diagonal, 1, 1) == with_pixels(diagonal, {})  # a hole of 2 pixels, and a tail
    assert cleaned(diagonal, 2, 2) == with_pixels(diagonal, {(2, 2): "#", (3, 3): "#"})


def test_a_speck_in_a_hole_becomes_part_of_the_object():
    ring = """
. . . . . . .
. # # # # # .
. # . . . # .
. # . # . # .
. # . . . # .
. # # # # # .
. . . . . . .
"""
    assert cleaned(ring, 8, 1).count("#") == 25
    assert cleaned(ring, 0, 1) == with_pixels(ring, {(3, 3): "."})
    assert cleaned(ring, 7, 1) == with_pixels(ring, {(3, 3): "."})  # the hole is larger


def test_the_largest_parts_stay_where_all_are_small():
    dots = """
# . # . .
. . . . #
. # . . #
"""
    assert cleaned(dots, 0, 5) == with_pixels(dots, {(0, 0): ".", (0, 2): ".", (2, 1): "."})
    equal = with_pixels(dots, {(2, 4): "."})
    assert cleaned(equal, 0, 5) == equal


IN_SPECK, IN_HOLE = (185, 15), (50, 25)
"""x and y in the image, in the pixel (1, 9) and in (2, 2)."""


@pytest.mark.parametrize(
    ("clicks", "kept"),
    [
        ([Click(*IN_SPECK, 1)], SPECK_1),
        ([Click(*IN_SPECK, 0)], {}),  # not what it says
        ([Click(*IN_HOLE, 0)], {(2, 2): "#"}),
        ([Click(*IN_HOLE, 1)], {}),
        ([Click(60, 55, 1), Click(*IN_SPECK, 1), Click(*IN_HOLE, 0)], SPECK_1 | {(2, 2): "#"}),
        ([Click(172, 15, 1)], SPECK_1),  # beside its pixel, where the enlarged speck may reach
        ([Click(0, 0, 1), Click(199, 99, 0), Click(0.5, 99.9, 0)], {}),  # at the corners is nothing
    ],
)
def test_what_the_user_pointed_at_stays(clicks: list[Click], kept: dict):
    expected = {place: value for place, value in (HOLES | SPECKS).items() if place not in kept}
    assert cleaned(DRAWN, 2, 2, *clicks) == with_pixels(DRAWN, expected)


@pytest.mark.parametrize("scale", [0.4, 1, 3.7])
def test_nothing_is_left_at_full_size(scale: float):
    """Whatever the logits beside a hole or a speck are, and larger or smaller than the low-resolution mask."""
    random = np.random.default_rng(0)
    logits = logits_of(DRAWN) * random.uniform(1e-6, 30, (10, 10)).astype("f4")
    logits[0, 8] = 0.0  # beside a speck: outside, but only just
    size_hw = (int(10 * scale), int(12 * scale))
    found = encode_logits(MaskCleaning(2, 2).clean(logits, (), size_hw), size_hw)
    alone = logits_of(with_pixels(DRAWN, HOLES | SPECKS)) * np.abs(logits / 3)
    mask = coco_mask.decode(found)
    assert mask.any()
    x0, y0, x1, y1 = (int(side) for side in rle_box_xyxy(found))
    assert x1 <= math.ceil(7 * 1.2 * scale)  # without the specks
    assert mask[y0 + math.ceil(scale) : y1 - math.ceil(scale), x0 + math.ceil(scale) : x1 - math.ceil(scale)].all()
    assert (x0, y0) == tuple(int(side) for side in rle_box_xyxy(encode_logits(alone, size_hw))[:2])


def test_cleaning_twice_changes_no_more():
    random = np.random.default_rng(1)
    for _ in range(50):
        logits = random.normal(size=(24, 24)).astype("f4")
        cleaning = MaskCleaning(*(int(one) for one in random.integers(0, 12, 2)))
        clicks = [Click(int(x), int(y), int(label)) for x, y, label in random.integers(0, (100, 100, 2), (3, 3))]
        once = cleaning.clean(logits, clicks, (100, 100))
        assert np.array_equal(cleaning.clean(once, clicks, (100, 100)), once)


@pytest.mark.parametrize("name", ["max_hole_area", "max_sprinkle_area"])
@pytest.mark.parametrize("value", [-1, MAX_AREA + 1, 10**400, 0.5, 4.0, math.nan, math.inf, "4", None, True, [4]])
def test_bad_areas_are_refused(name: str, value: Any):
    with pytest.raises(UserError, match=f"{name} must be a whole number .* from 0 .* to {MAX_AREA}, got"):
        MaskCleaning(**{name: value})


def test_areas_of_numpy_are_plain_numbers():
    assert type(MaskCleaning(np.int64(4), np.uint8(3)).max_hole_area) is int
