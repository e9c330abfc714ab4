"""Run-length codes that are not decoded whole: differences, windows, and runs without a pixel."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lora.data.masks import decode_mask, encode_mask_at
from sam3lora.data.rle import decode_window, encode_rle, read_rle, rle_difference

EMPTY, FULL = np.zeros((4, 5), dtype=bool), np.ones((4, 5), dtype=bool)


def ring() -> np.ndarray:
    mask = FULL.copy()
    mask[1:3, 1:4] = False
    return mask


@pytest.mark.parametrize("first", [EMPTY, FULL, ring(), ~ring()])
@pytest.mark.parametrize("second", [EMPTY, FULL, ring(), ~ring()])
def test_difference(first, second):
    codes = encode_rle(first), encode_rle(second)
    assert np.array_equal(coco_mask.decode(rle_difference(*codes)), first & ~second)
    assert np.array_equal(coco_mask.decode(rle_difference(codes[0])), first)
    column = encode_rle(np.arange(5) == np.full((4, 1), 2))
    assert np.array_equal(coco_mask.decode(rle_difference(*codes, column)), first & ~second & (np.arange(5) != 2))


def test_masks_of_different_sizes_have_no_difference():
    with pytest.raises(ValueError, match=r"got \[4, 5\] and \[5, 4\]"):
        rle_difference(encode_rle(FULL), encode_rle(FULL.T))


@pytest.mark.parametrize("mask", [EMPTY, FULL, ring(), ~ring(), np.eye(4, 5, dtype=bool)])
def test_every_window(mask):
    # compressed as text and as bytes
    codes = encode_rle(mask), coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    for y0, x0 in np.ndindex(4, 5):
        for height, width in np.ndindex(4 - y0 + 1, 5 - x0 + 1):
            for rle in codes:
                part = decode_window(rle, x0, y0, width, height)
                assert part.dtype == bool
                assert np.array_equal(part, mask[y0 : y0 + height, x0 : x0 + width])


@pytest.mark.parametrize(
    ("runs", "same"),
    [
        ([2, 3, 0, 2, 5], [2, 5, 5]),
        ([2, 3, 0, 0, 0, 2, 5], [2, 5, 5]),
        ([2, 3, 7, 0], [2, 3, 7]),
        ([0, 0, 4, 8], [4, 8]),
        ([0, 0, 0, 4, 8], [0, 4, 8]),
        ([0, 12], [0, 12]),
        ([12, 0], [12]),
    ],
)
def test_runs_without_a_pixel_are_joined(runs, same):
    """Where those of two masks meet, pycocotools' merge would stop and leave the rest as it was in memory."""
    plain = coco_mask.frPyObjects({"size": [3, 4], "counts": runs}, 3, 4)
    expected = coco_mask.frPyObjects({"size": [3, 4], "counts": same}, 3, 4)
    for counts in (runs, plain["counts"].decode()):
        rle = read_rle({"size": [3, 4], "counts": counts})
        assert rle == expected
        assert coco_mask.merge([rle, rle], intersect=True) == expected
        assert np.array_equal(coco_mask.decode(rle), coco_mask.decode(plain))


def test_codes_at_the_annotated_size():
    assert encode_mask_at(None, (4, 5)) is None
    for size_hw in ((4, 5), (8, 10), (2, 2)):
        rle = encode_mask_at(encode_rle(ring()), size_hw)
        assert tuple(rle["size"]) == size_hw
        assert np.array_equal(coco_mask.decode(rle), decode_mask(encode_rle(ring()), size_hw))
    large = ring().repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(decode_mask(encode_rle(ring()), (8, 10)), large)
