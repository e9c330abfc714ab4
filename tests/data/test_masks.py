"""Masks and boxes through placement: drawn small cases, and polygon against run-length."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.data.augment import Placement, choose_placement, place_image
from sam3lora.data.masks import decode_mask, encode_segmentation, mask_area, mask_box, place_mask
from sam3lora.data.rle import decode_counts, read_rle

from .coco_builder import square


def as_rle(polygons, size_hw) -> dict:
    rle = encode_segmentation(polygons, size_hw)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_area_box_and_decoding_of_a_square():
    polygons = [square(10, 20, 5)]
    assert mask_area(polygons, (60, 80)) == 25
    assert mask_box(polygons, (60, 80)) == (10, 20, 5, 5)
    mask = decode_mask(polygons, (60, 80))
    assert mask.sum() == 25
    assert mask[20:25, 10:15].all()
    assert (mask_area(None, (60, 80)), mask_box(None, (60, 80)), decode_mask([], (6, 8)).sum()) == (0, None, 0)


def test_polygon_outside_the_image_is_clipped():
    assert mask_area([square(-5, -5, 10)], (60, 80)) == 25
    assert mask_area([square(75, 55, 10)], (60, 80)) == 25


def test_compressed_counts_agree_with_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygons = [rng.uniform(0, 100, 12).tolist()]
        rle = encode_segmentation(polygons, (100, 100))
        counts = decode_counts(rle["counts"].decode())
        assert sum(counts) == 100 * 100
        assert sum(counts[1::2]) == mask_area(polygons, (100, 100))
        assert read_rle({"size": [100, 100], "counts": counts}) == rle


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", value) for value in (None, [48], ["6", "8"], [6.5, 8.0], [0, 8], [10**6, 10**6], [-6, -8])]
    + [("counts", value) for value in (None, ["48"], [48.5], [True, 47], [-2, 50])],
)
def test_malformed_runs_are_refused(field, value):
    with pytest.raises(ValueError, match=f"expected {field}"):
        read_rle({"size": [6, 8], "counts": [48]} | {field: value})


@pytest.mark.parametrize("placement", [Placement(), Placement(0.5, 0.25, 0.125), Placement(0.5, 0.5, 0.0, flip=True)])
def test_squares_land_where_the_placement_says(placement):
    # the left upper quarter of an image of 80 x 60
    polygons = [[0, 0, 40, 0, 40, 30, 0, 30]]
    box = placement.map_boxes(np.array([[0, 0, 0.5, 0.5]]))[0] * 64
    expected = np.zeros((64, 64), dtype=bool)
    expected[round(box[1]) : round(box[3]), round(box[0]) : round(box[2])] = True
    assert np.array_equal(place_mask(polygons, (60, 80), placement, 64), expected)
    assert np.array_equal(place_mask(as_rle(polygons, (60, 80)), (60, 80), placement, 64), expected)


def test_polygons_and_runs_agree_under_random_placements():
    rng = np.random.default_rng(1)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 60 + 15 * np.sin(3 * angles)
    blob = np.stack([150 + radius * np.cos(angles), 100 + radius * np.sin(angles)], axis=1).ravel().tolist()
    for _ in range(10):
        placement = choose_placement(1008, rng, augmentation="sam3", horizontal_flip=0.5)
        for size in (288, 504):
            drawn = place_mask([blob], (200, 300), placement, size)
            moved = place_mask(as_rle([blob], (200, 300)), (200, 300), placement, size)
            assert iou(drawn, moved) > 0.97


def test_image_and_mask_move_together():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    image[10:40, 20:60] = 255
    rng = np.random.default_rng(2)
    for _ in range(10):
        placement = choose_placement(336, rng, augmentation="sam3", horizontal_flip=0.5)
        frame = place_image(image, placement, 336)[..., 0] > 127
        mask = place_mask([[20, 10, 60, 10, 60, 40, 20, 40]], (60, 80), placement, 336)
        assert iou(frame, mask) > 0.95


def test_sam3_placement_follows_the_recipe():
    rng = np.random.default_rng(0)
    drawn = [choose_placement(1008, rng, augmentation="sam3") for _ in range(400)]
    sides = {round(p.scale * 1008) for p in drawn}
    assert sides == set(range(480, 1009, 32))
    assert all(p.offset_x + p.scale <= 1 and p.offset_y + p.scale <= 1 and not p.flip for p in drawn)
    assert choose_placement(1008, rng) == Placement()
    # at another resolution the share of the frame is the same
    small = {round(choose_placement(336, rng, augmentation="sam3").scale * 336) for _ in range(400)}
    assert (min(small), max(small)) == (160, 331)


def test_place_image_pads_with_black():
    frame = place_image(np.full((60, 80, 3), 200, dtype=np.uint8), Placement(0.5, 0.25, 0.5), 64)
    assert (frame[32:, 16:48] == 200).all()
    assert frame.sum() == 200 * 32 * 32 * 3
