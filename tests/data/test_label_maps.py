"""Label maps of small records drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.data.augment import Placement
from sam3lora.data.label_maps import LabelMaps
from sam3lora.label_values import IGNORE

EXCLUSIVE = LabelMaps({"crack": 1, "hole": 2})
OVERLAPPING = LabelMaps({"crack": 1, "hole": 2}, overlapping=True)


def rectangle(category: str, x0: int, y0: int, x1: int, y1: int, *, crowd: bool = False, mask: bool = True) -> dict:
    return {
        "category": category,
        "bbox_xywh": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]] if mask else None,
        "iscrowd": crowd,
    }


def record(*annotations: dict, height: int = 4, width: int = 6) -> dict:
    return {"height": height, "width": width, "annotations": list(annotations)}


def rows(*lines: str) -> list[list[int]]:
    return [[IGNORE if letter == "x" else int(letter) for letter in line] for line in lines]


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_object_is_on_top_whatever_the_order(order):
    both = [rectangle("crack", 0, 0, 4, 3), rectangle("hole", 2, 1, 5, 3)]
    [label_map] = EXCLUSIVE.of_record(record(*both[::order]))
    assert label_map.tolist() == rows("111100", "112220", "112220", "000000")


def test_classes_that_overlap_keep_all_their_pixels():
    cracks, holes = OVERLAPPING.of_record(record(rectangle("crack", 0, 0, 4, 3), rectangle("hole", 2, 1, 5, 3)))
    assert cracks.tolist() == rows("111100", "111100", "111100", "000000")
    assert holes.tolist() == rows("000000", "001110", "001110", "000000")


def test_crowd_regions_and_objects_without_a_mask_are_void_where_no_object_is():
    crowd, box = rectangle("crack", 0, 0, 3, 2, crowd=True), rectangle("hole", 4, 2, 6, 4, mask=False)
    [label_map] = EXCLUSIVE.of_record(record(rectangle("crack", 2, 0, 5, 3), crowd, box))
    assert label_map.tolist() == rows("xx1110", "xx1110", "00111x", "0000xx")
    cracks, holes = OVERLAPPING.of_record(record(crowd, box))
    assert cracks.tolist() == rows("xxx000", "xxx000", "000000", "000000")
    assert holes.tolist() == rows("000000", "000000", "0000xx", "0000xx")


def test_other_categories_are_background():
    assert not EXCLUSIVE.of_record(record(rectangle("moss", 0, 0, 4, 3))).any()
    assert EXCLUSIVE.of_record(record(rectangle("Crack", 0, 0, 6, 4))).all()


def test_placed_maps_follow_flips_and_shrink():
    one = record(rectangle("crack", 0, 0, 4, 2), height=8, width=8)
    [plain] = EXCLUSIVE.placed(one, Placement(), 4)
    assert plain.tolist() == rows("1100", "0000", "0000", "0000")
    [mirrored] = EXCLUSIVE.placed(one, Placement(flip=True, flip_vertical=True), 4)
    assert mirrored.tolist() == plain[::-1, ::-1].tolist()


def test_what_lies_beside_the_image_in_its_frame_is_void():
    one = record(rectangle("crack", 0, 0, 4, 8), height=8, width=8)
    [label_map] = EXCLUSIVE.placed(one, Placement(scale=0.5, offset_x=0.5), 4)
    assert label_map.tolist() == rows("xx10", "xx10", "xxxx", "xxxx")


def test_a_frame_at_the_size_of_the_image_has_the_labels_of_the_image():
    rng = np.random.default_rng(0)
    objects = []
    for _ in range(12):
        x, y = rng.integers(0, 12, 2).tolist()
        objects.append(rectangle(str(rng.choice(["crack", "hole"])), x, y, x + int(rng.integers(1, 5)), y + 4))
    one = record(*objects, height=16, width=16)
    for labels in (EXCLUSIVE, OVERLAPPING):
        assert np.array_equal(labels.placed(one, Placement(), 16), labels.of_record(one))
