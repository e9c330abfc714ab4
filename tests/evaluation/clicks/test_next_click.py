"""Where the next click goes, in masks drawn by hand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.click import Click
from sam3lora.evaluation.clicks import next_click as module


def drawn(*rows: str) -> np.ndarray:
    """Bool (H, W), True where a row has a #."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def next_click(
    truth_HW: np.ndarray, found_HW: np.ndarray, clicked: Iterable[Click] = (), ignored_HW: np.ndarray | None = None
) -> Click | None:
    """Of masks as they are drawn."""
    ignored = None if ignored_HW is None else encode_rle(ignored_HW)
    return module.next_click(encode_rle(truth_HW), encode_rle(found_HW), clicked, ignored)


NOTHING = drawn(*["........."] * 5)
SQUARE = drawn(".........", ".###.....", ".###.....", ".###.....", ".........")


def test_nothing_to_click_on():
    assert next_click(NOTHING, NOTHING) is None
    assert next_click(SQUARE, SQUARE) is None
    # the only pixel in error was clicked before
    point = drawn("...", ".#.", "...")
    assert next_click(point, np.ones_like(point), [Click(x, y) for x in range(3) for y in range(3)]) is None


def test_missed_object_is_clicked_in_its_middle():
    assert next_click(SQUARE, NOTHING) == Click(2, 2, 1)


def test_wrong_object_is_clicked_out():
    assert next_click(NOTHING, SQUARE) == Click(2, 2, 0)
    # the same when the object itself is there besides: only the error counts
    both = SQUARE | np.roll(SQUARE, 4, axis=1)
    assert next_click(SQUARE, both) == Click(6, 2, 0)


def test_the_deeper_error_wins_not_the_larger_one():
    long = drawn("#########", ".........", ".........", ".........", ".........")
    square = drawn(".........", ".........", "......###", "......###", "......###")
    assert next_click(square, long) == Click(7, 3, 1)
    assert next_click(long, square) == Click(7, 3, 0)


def test_of_equal_errors_the_wrong_one_wins():
    left, right = SQUARE, np.roll(SQUARE, 4, axis=1)
    assert next_click(left, right) == Click(6, 2, 0)
    assert next_click(right, left) == Click(2, 2, 0)


def test_of_equal_pixels_the_first_row_by_row_is_taken():
    # all pixels of a line are equally deep; of two objects, the upper one comes first although it is further right
    assert next_click(drawn("....", ".###", "...."), drawn(*["...."] * 3)) == Click(1, 1, 1)
    assert next_click(drawn("...#", "....", "#..."), drawn(*["...."] * 3)) == Click(3, 0, 1)


def test_equal_depths_are_equal():
    """Discs whose middle pixels are equally deep: OpenCV's distances differ among them."""
    y, x = np.mgrid[:80, :200]
    mask = np.zeros((80, 200), dtype=bool)
    for centre_x, centre_y in ((160, 30), (40, 30), (100, 50)):
        mask |= (x - centre_x) ** 2 + (y - centre_y) ** 2 < 50
    clicks: list[Click] = []
    for _ in range(3):
        clicks.append(next_click(mask, np.zeros_like(mask), clicks))
    assert clicks == [Click(40, 30, 1), Click(160, 30, 1), Click(100, 50, 1)]


def squared_depths(mask_HW: np.ndarray) -> np.ndarray:
    """Of each pixel the squared distance to the nearest one outside, 0 outside."""
    outside_N2 = np.argwhere(~np.pad(mask_HW, 1)) - 1
    depths_HW = np.zeros(mask_HW.shape, dtype=int)
    for y, x in np.argwhere(mask_HW):
        depths_HW[y, x] = ((outside_N2 - (y, x)) ** 2).sum(axis=1).min()
    return depths_HW


def test_no_pixel_is_deeper():
    rng = np.random.default_rng(7)
    for _ in range(100):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        mask = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 3) > 0
        clicked = [Click(int(rng.integers(width)), int(rng.integers(height))) for _ in range(rng.integers(0, 9))]
        depths_HW = squared_depths(mask)
        for click in clicked:
            depths_HW[click.y, click.x] = 0
        y, x = divmod(int(depths_HW.argmax()), width)
        assert next_click(mask, np.zeros_like(mask), clicked) == (Click(x, y, 1) if depths_HW.any() else None)


def test_a_large_image_costs_the_boxes_of_its_errors():
    """An image of 168 megapixels with a square, of which a third is found, and a speck."""
    height, width = 12_000, 14_000

    def boxes(*boxes_xywh: tuple[int, int, int, int]) -> dict:
        return coco_mask.merge(coco_mask.frPyObjects(np.array(boxes_xywh, dtype=float), height, width))

    truth = boxes((7_000, 6_000, 3_000, 3_000))
    found = boxes((7_000, 6_000, 1_000, 3_000), (13_990, 11_990, 10, 10))
    tracemalloc.start()
    click = module.next_click(truth, found)
    assert click == Click(8_999, 6_999, 1)  # 2,000 x 3,000 are missed: 1,000 from three sides, the first such pixel
    assert module.next_click(truth, found, [click]) == Click(9_000, 6_999, 1)
    assert module.mask_iou(truth, found) == 3e6 / (9e6 + 100)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most_bytes < 2_000 * 3_000 * 10


def test_the_border_of_the_image_bounds_an_error():
    # as deep as if the image went on with right pixels, so the middle and not the border is clicked
    assert next_click(np.ones((5, 5), dtype=bool), np.zeros((5, 5), dtype=bool)) == Click(2, 2, 1)


def test_ring_is_clicked_in_the_middle_of_its_band():
    y, x = np.mgrid[:41, :41]
    radius = np.hypot(y - 20, x - 20)
    ring = (radius >= 8) & (radius <= 16)
    click = next_click(ring, np.zeros_like(ring))
    assert ring[click.y, click.x]
    assert abs(np.hypot(click.y - 20, click.x - 20) - 12) <= 1


def test_pixels_clicked_before_are_not_clicked_again():
    clicks: list[Click] = []
    for _ in range(9):
        clicks.append(next_click(SQUARE, NOTHING, clicks))
    assert clicks[0] == Click(2, 2, 1)
    assert len({(click.x, click.y) for click in clicks}) == 9
    assert all(SQUARE[click.y, click.x] for click in clicks)
    assert next_click(SQUARE, NOTHING, clicks) is None
    # in the other kind of error too, and at a click between pixels
    assert next_click(NOTHING, drawn(*["..#......"] * 5), [Click(2.7, 2.2, 0)]) != Click(2, 2, 0)


def test_ignored_pixels_are_no_error():
    crowd = drawn(*["......###"] * 5)
    assert next_click(SQUARE, crowd, (), crowd) == Click(2, 2, 1)
    assert next_click(NOTHING, crowd, (), crowd) is None
    # and bound one: of a square of 5, a crowd leaves the left three columns
    whole = np.ones((5, 5), dtype=bool)
    right = drawn(*["...##"] * 5)
    assert next_click(whole, np.zeros_like(whole), (), right) == Click(1, 1, 1)


@pytest.mark.parametrize(
    ("truth", "found", "ignored", "expected"),
    [
        ("....", "....", None, 1.0),  # nothing there and nothing found
        ("##..", "....", None, 0.0),
        ("##..", ".##.", None, 1 / 3),
        ("##..", ".##.", "#...", 1 / 2),
        ("##..", ".##.", ".#..", 0.0),
        ("##..", "##..", "####", 1.0),
    ],
)
def test_iou(truth, found, ignored, expected):
    masks = [None if mask is None else encode_rle(drawn(mask)) for mask in (truth, found, ignored)]
    assert module.mask_iou(*masks) == expected
