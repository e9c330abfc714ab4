"""Run-length codes made from small logits equal those of the enlarged mask."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from sam3lora.data.rle import read_rle
from sam3lora.engine.mask_codes import encode_logits, has_pixel, rle_area_px, rle_box_xyxy, rle_to_polygons

# (small size, size of the image): larger, equal, smaller, mixed, one pixel, not square
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 7)),
    ((6, 5), (1, 1)),
    ((1, 9), (4, 30)),
    ((9, 1), (30, 4)),
    ((2, 2), (17, 9)),
    ((16, 16), (16, 16)),
    ((16, 16), (31, 57)),
    ((16, 16), (5, 40)),
    ((16, 16), (40, 5)),
    ((20, 13), (7, 3)),
    ((24, 24), (1, 90)),
    ((24, 24), (100, 133)),
]


def enlarged(logits: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The plain way: every pixel's logit."""
    return F.interpolate(torch.from_numpy(logits)[None, None], size_hw, mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def check(logits: np.ndarray, size_hw: tuple[int, int]) -> None:
    expected = enlarged(logits, size_hw)
    rle = encode_logits(logits, size_hw)
    decoded = coco_mask.decode(rle)
    certain = np.abs(expected) >= 1e-4
    np.testing.assert_array_equal(decoded[certain], (expected > 0)[certain])
    # and it is the one code that pycocotools has for this mask
    assert rle == encode(decoded)


def blob(side: int, radius: float, seed: int) -> np.ndarray:
    """Logits of a wobbly disc."""
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle = np.arctan2(y, x)
    wobble = sum(0.08 * np.cos((k + 2) * angle + phase) for k, phase in enumerate(phases))
    return (radius * (1 + wobble) - np.hypot(x, y)).astype(np.float32)


@pytest.mark.parametrize("size_hw", [(1, 1), (7, 5)])
def test_no_pixel(size_hw):
    rle = encode_logits(np.full((4, 3), -1.0), size_hw)
    assert rle == encode(np.zeros(size_hw))
    assert rle_area_px(rle) == 0
    assert rle_box_xyxy(rle) == (0, 0, 0, 0)
    assert rle_to_polygons(rle) == []
    # 0 is outside, as `> 0` says
    assert encode_logits(np.zeros((4, 3)), size_hw) == rle


@pytest.mark.parametrize("size_hw", [(1, 1), (7, 5)])
def test_every_pixel(size_hw):
    rle = encode_logits(np.full((4, 3), 0.5), size_hw)
    assert rle == encode(np.ones(size_hw))
    height, width = size_hw
    assert rle_area_px(rle) == height * width
    assert rle_box_xyxy(rle) == (0, 0, width, height)


@pytest.mark.parametrize(("small_hw", "size_hw"), SIZES)
def test_noise_equals_interpolation(small_hw, size_hw):
    # noise of every sparsity changes sign between most neighbours: the hardest outlines there are
    generator = np.random.default_rng(0)
    for shift in (-1.5, -0.7, 0.0, 0.7, 1.5):
        check(generator.normal(shift, 1, small_hw).astype(np.float32), size_hw)


def test_random_sizes_equal_interpolation():
    generator = np.random.default_rng(1)
    for _ in range(150):
        small_hw, size_hw = generator.integers(1, 30, 2), generator.integers(1, 90, 2)
        logits = generator.normal(generator.normal(), 1, small_hw) * 10 ** generator.uniform(-1, 1.5)
        check(logits.astype(np.float32), tuple(size_hw.tolist()))


@pytest.mark.parametrize("size_hw", [(8, 8), (24, 40), (5, 3), (64, 64)])
@pytest.mark.parametrize("first", [1.0, -1.0])
def test_checkerboards_equal_interpolation(size_hw, first):
    board = first * (-1.0) ** np.add.outer(np.arange(8), np.arange(8))
    check(board.astype(np.float32), size_hw)


@pytest.mark.parametrize("place", [(0, 0), (0, 4), (5, 0), (5, 4), (2, 2)])
def test_a_single_pixel_anywhere(place):
    # corners and edges have no neighbour to fade into
    logits = np.full((6, 5), -2.0, dtype=np.float32)
    logits[place] = 3.0
    for size_hw in ((6, 5), (30, 25), (31, 17), (3, 2)):
        check(logits, size_hw)


@pytest.mark.parametrize(
    ("logits", "expected"), [([1, -3], [1, 0, 0, 0]), ([-3, 1], [0, 0, 0, 1]), ([2, 0], [1, 1, 1, 0])]
)
def test_a_pixel_of_exactly_0_is_outside(logits, expected):
    # two pixels to four, a quarter and three quarters of the way: 1 0 -2 -3, and back
    column, row = np.array(logits, dtype=np.float32)[:, None], np.array(logits, dtype=np.float32)[None]
    assert (enlarged(column, (4, 1))[:, 0] > 0).tolist() == expected
    assert encode_logits(column, (4, 1)) == encode(np.array(expected)[:, None])
    assert encode_logits(row, (1, 4)) == encode(np.array(expected)[None])


def test_it_takes_any_number_type():
    logits = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float16)
    rle = encode_logits(logits, (np.int64(13), np.int64(11)))
    assert rle == encode_logits(logits.astype(np.float64), (13, 11))
    assert json.loads(json.dumps(rle)) == rle
    # what is written is what the strict reader of data sets takes
    assert read_rle(rle)["counts"] == rle["counts"].encode("ascii")


def test_area_and_box_of_a_rectangle():
    mask = np.zeros((9, 7))
    mask[2:5, 1:6] = 1
    assert rle_area_px(encode(mask)) == 15
    assert rle_box_xyxy(encode(mask)) == (1, 2, 6, 5)


@pytest.mark.parametrize("seed", range(4))
def test_outlines_of_blobs_fill_to_the_same_mask(seed):
    rle = encode_logits(blob(64, 20, seed), (300, 400))
    mask = coco_mask.decode(rle)
    polygons = rle_to_polygons(rle)
    as_coco = coco_mask.merge(coco_mask.frPyObjects(polygons, 300, 400))
    np.testing.assert_array_equal(coco_mask.decode(as_coco), mask)


def test_polygons_of_parts_holes_and_specks():
    mask = np.zeros((20, 20))
    mask[2:9, 2:9] = 1
    mask[4:6, 4:6] = 0  # a hole is lost
    mask[12:15, 12:18] = 1
    mask[19, 0] = 1  # a speck
    mask[10, 1:6] = 1  # a line, thin as a crack
    polygons = sorted(rle_to_polygons(encode(mask)))
    assert polygons == [
        [0.0, 19.0, 0.0, 20.0, 1.0, 20.0, 1.0, 19.0],
        [1.0, 10.0, 1.0, 11.0, 6.0, 11.0, 6.0, 10.0],
        [2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 2.0],
        [12.0, 12.0, 12.0, 15.0, 18.0, 15.0, 18.0, 12.0],
    ]


def test_whether_a_mask_has_a_pixel():
    # Single pixels, lines and blocks, enlarged and reduced, as the code itself says.
    generator = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        small_hw, size_hw = generator.integers(1, 12, 2), tuple(map(int, generator.integers(1, 30, 2)))
        logits = np.where(
            generator.random(small_hw) < 0.15, generator.random(small_hw), -20 * generator.random(small_hw)
        )
        seen.append(rle_area_px(encode_logits(logits, size_hw)) > 0)
        assert has_pixel(logits, size_hw) == seen[-1]
    assert 50 < sum(seen) < 280
