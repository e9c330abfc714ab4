"""LabelMe: shapes that become objects, groups of polygons, splits, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sam3lora.data.convert.labelme import read_labelme
from sam3lora.errors import UserError

from .convert_cases import read_first, read_set, write_image


def shape(kind: str, points: list, label="crack", group_id=None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group_id}


def write(folder: Path, *shapes: dict, stem="a", **changes) -> Path:
    write_image(folder / f"{stem}.png")
    content = {"shapes": list(shapes), "imagePath": f"..\\{stem}.png", "imageHeight": 60, "imageWidth": 80}
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_no_shape_is_a_negative(tmp_path):
    write(tmp_path)
    assert read_first(read_labelme, tmp_path)[0].objects == []


def test_polygon_rectangle_and_circle(tmp_path):
    write(
        tmp_path,
        shape("polygon", [[10, 10], [30, 10], [30, 30], [10, 30]]),
        shape("rectangle", [[50, 40], [20, 20]]),  # any two opposite corners
        shape("circle", [[40, 30], [40, 40]], "hole"),
    )
    image, faults = read_first(read_labelme, tmp_path)
    rectangle, polygon, circle = image.objects
    assert (polygon.bbox_xywh, polygon.segmentation) == ((10, 10, 20, 20), [[10, 10, 30, 10, 30, 30, 10, 30]])
    assert (rectangle.bbox_xywh, rectangle.segmentation) == ((20, 20, 30, 20), None)
    assert circle.category == "hole"
    assert circle.decode((60, 80)).sum() == pytest.approx(np.pi * 100, rel=0.02)
    assert faults == {}


def test_shapes_without_area_are_counted(tmp_path):
    shapes = [("point", 1), ("line", 2), ("polygon", 2), ("circle", 1), ("rectangle", 1)]
    write(tmp_path, *(shape(kind, [[1, 1], [9, 9]][:num_points]) for kind, num_points in shapes))
    image, faults = read_first(read_labelme, tmp_path)
    assert (image.objects, faults) == ([], {"skipped_shape": 5})


def test_polygons_of_a_group_are_one_object(tmp_path):
    first, second = [[0, 0], [10, 0], [10, 10], [0, 10]], [[20, 0], [30, 0], [30, 10], [20, 10]]
    write(
        tmp_path,
        shape("polygon", first, group_id=1),
        shape("polygon", second, group_id=1),
        shape("polygon", second, "hole", group_id=1),  # another label is another object
        shape("polygon", second),
    )
    objects = read_first(read_labelme, tmp_path)[0].objects
    assert [(thing.category, len(thing.segmentation)) for thing in objects] == [("crack", 2), ("hole", 1), ("crack", 1)]


def test_size_of_the_label_file_is_the_one_that_coordinates_refer_to(tmp_path):
    write(tmp_path, shape("rectangle", [[0, 0], [40, 30]]), imageHeight=30, imageWidth=40)
    image, faults = read_first(read_labelme, tmp_path)
    assert (image.size_hw, image.objects[0].bbox_xywh) == ((30, 40), (0, 0, 40, 30))
    assert faults == {"label_size_mismatch": 1}


def test_splits_and_files_without_their_partner(tmp_path):
    write(tmp_path / "train", shape("rectangle", [[1, 1], [9, 9]]))
    write(tmp_path / "val", stem="b")
    write_image(tmp_path / "val" / "unlabelled.png")
    write(tmp_path / "val", stem="c")
    (tmp_path / "val" / "c.png").unlink()
    labelled, faults = read_set(read_labelme, tmp_path)
    assert {name: len(images) for name, images in labelled.splits.items()} == {"train": 1, "valid": 1}
    assert faults == {"unlabelled_image": 1, "label_without_image": 1}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"shapes": [', "truncated"),
        ('{"images": []}', "shapes"),
        ('{"shapes": [{"label": "", "points": []}]}', "shape 1: .*label"),
        ('{"shapes": [{"label": "a", "points": [[1, 2, 3]]}]}', "shape 1: .*points"),
        ('{"shapes": [{"label": "a", "points": [[1, NaN]]}]}', "shape 1: .*finite"),
    ],
)
def test_invalid_file_is_named(tmp_path, text, place):
    path = write(tmp_path)
    path.write_text(text)
    with pytest.raises(UserError, match=rf"a\.json.*{place}") as error:
        read_first(read_labelme, tmp_path)
    assert str(path) in str(error.value)
