"""Clicks and boxes that make no sense in an image are refused, each by name."""

from __future__ import annotations

import json
import math

import numpy as np
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
        ((1,), r"\(1,\)"),
        ((1, 1, 1, 1), "click 2"),
        (1, "click 2"),  # clicks are a list of pairs, and not numbers one after the other
        ("11", "click 2"),
        ({"x": 1, "y": 1}, "click 2"),
        (("1", 1), "x='1'"),
        ((1, None), "y=None"),
        ((1, True), "y=True"),
        ((10**400, 0), "x=1000"),
        (((1, 1), 1), "x="),
        ((1, 1, 0.5), "label=0.5"),
        ((1, 1, "in"), "label='in'"),
        ((1, 1, None), "label=None"),
        ((1, 1, math.nan), "label=nan"),
    ],
)
def test_a_click_that_makes_no_sense(wrong, named):
    with pytest.raises(UserError, match=named):
        checked_clicks([(1, 1), wrong], (4, 7))


@pytest.mark.parametrize("wrong", [None, 5, "1,1", Click(1, 1), (1, 1)])
def test_clicks_are_a_list(wrong):
    with pytest.raises(UserError, match="click"):
        checked_clicks(wrong, (4, 7))


def test_numbers_of_numpy_become_plain_ones():
    rows = [np.array([6, 3]), np.array([0.5, 1, 0], np.float32), (np.int64(2), np.uint8(1), np.True_)]
    clicks = checked_clicks(rows, (4, 7))
    assert clicks == checked_clicks(np.array([[6, 3, 1], [0.5, 1, 0], [2, 1, 1]]), (4, 7))
    assert json.loads(json.dumps([[one.x, one.y, one.label] for one in clicks])) == [[6, 3, 1], [0.5, 1, 0], [2, 1, 1]]
    assert json.dumps(checked_box(np.array([1, 2, 3, 4], np.float32), (4, 7))) == "[1.0, 2.0, 3.0, 4.0]"


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
        ("0", 0, 2, 2),
        (0, 0, 10**400, 2),
        [(0, 0), (2, 2)],
        "0022",
        5,
    ]:
        with pytest.raises(UserError, match="expected x0 y0 x1 y1"):
            checked_box(wrong, (4, 7))
