"""Clicks and boxes that make no sense in an image are refused, each by name."""

from __future__ import annotations

import math

import pytest

from sam3lora.engine.clicks.click import Click, checked_box, checked_clicks
from sam3lora.errors import UserError


def test_tuples_are_clicks():
    assert checked_clicks([], (4, 4)) == ()
    # x counts to the width, y to the height; without a label a click belongs to the object
    assert checked_clicks([(6, 3), (0, 0, 0), Click(6.9, 3.9)], (4, 7)) == (
        Click(6, 3, 1),
        Click(0, 0, 0),
        Click(6.9, 3.9, 1),
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ((7, 0), "x=7"),  # the width itself is outside
        ((0, 4), "y=4"),
        ((-0.5, 0), "x=-0.5"),
        ((math.nan, 0), "nan"),
        ((0, math.inf), "inf"),
        ((1, 1, 2), "label=2"),
        ((1, 1, -1), "label=-1"),
        ((1,), r"\[1\]"),
        ((1, 1, 1, 1), "click 2"),
    ],
)
def test_a_click_that_makes_no_sense(wrong, named):
    with pytest.raises(UserError, match=named):
        checked_clicks([(1, 1), wrong], (4, 7))


def test_boxes():
    assert checked_box((0, 0, 7, 4), (4, 7)) == (0, 0, 7, 4)
    # another order, no width, too wide, too high, negative, not a number, three values
    for wrong in [
        (3, 1, 2, 2),
        (2, 1, 2, 2),
        (0, 0, 8, 4),
        (0, 0, 7, 5),
        (-1, 0, 2, 2),
        (math.nan, 0, 2, 2),
        (0, 1, 2),
    ]:
        with pytest.raises(UserError, match="expected x0 y0 x1 y1"):
            checked_box(wrong, (4, 7))
