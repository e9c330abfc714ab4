"""The deepest pixel of a mask, against the distance of every pixel to every other: by chance and by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam3lora.data.rle import encode_rle
from sam3lora.evaluation.clicks.deepest_pixel import deepest_pixel


def squared_depths(mask_HW: np.ndarray) -> np.ndarray:
    """Whole numbers: of each pixel the squared distance to the nearest one outside, 0 outside."""
    outside_N2 = np.argwhere(~np.pad(mask_HW, 1)) - 1
    depths_HW = np.zeros(mask_HW.shape, dtype=int)
    for y, x in np.argwhere(mask_HW):
        depths_HW[y, x] = ((outside_N2 - (y, x)) ** 2).sum(axis=1).min()
    return depths_HW


def test_every_pixel_is_looked_at():
    rng = np.random.default_rng(7)
    for number in range(500):
        size_hw = (int(rng.integers(1, 50)), int(rng.integers(1, 50)))
        if number % 2:
            mask = rng.random(size_hw) < rng.choice([0, 0.1, 0.5, 0.9, 0.99, 1])
        else:
            mask = cv2.GaussianBlur(rng.standard_normal(size_hw), (0, 0), 4) > 0
        left_out = [(int(rng.integers(size_hw[1])), int(rng.integers(size_hw[0]))) for _ in range(rng.integers(0, 9))]
        depths_HW = squared_depths(mask)
        for x, y in left_out:
            depths_HW[y, x] = 0
        y, x = divmod(int(depths_HW.argmax()), size_hw[1])
        expected = (depths_HW[y, x] ** 0.5, x, y) if depths_HW.any() else (0.0, 0, 0)
        assert deepest_pixel(encode_rle(mask), left_out) == expected


def test_of_equal_pixels_the_first_row_by_row_is_taken():
    """Discs whose middle pixels are equally deep: OpenCV's distances differ among them."""
    y, x = np.mgrid[:80, :200]
    mask = np.zeros((80, 200), dtype=bool)
    for centre_x, centre_y in ((160, 30), (40, 30), (100, 50)):
        mask |= (x - centre_x) ** 2 + (y - centre_y) ** 2 < 50
    rle = encode_rle(mask)
    places = []
    for _ in range(3):
        depth, *place = deepest_pixel(rle, places)
        assert depth == 50**0.5
        places.append(tuple(place))
    assert places == [(40, 30), (160, 30), (100, 50)]


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (16, 17), (700, 701)])
def test_whole_images(height, width):
    rle = encode_rle(np.ones((height, width), dtype=bool))
    middle = ((min(height, width) - 1) // 2,) * 2
    assert deepest_pixel(rle) == ((min(height, width) + 1) // 2, *middle)
