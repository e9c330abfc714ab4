"""LabelMe shapes: which enclose something, which make one object, and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage
from sam3lora.data.convert.read_labelme import read_labelme
from sam3lora.errors import UserError


def shape(kind: str, points: list, label="crack", group_id=None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group_id}


def write(folder: Path, *shapes: dict, stem="a", **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60)).save(folder / f"{stem}.png")
    content = {"shapes": list(shapes), "imagePath": f"..\\{stem}.png", "imageHeight": 60, "imageWidth": 80}
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def read_one(folder: Path) -> tuple[LabelledImage, FaultLog]:
    log = FaultLog()
    return read_labelme(folder, None, log).splits["."][0], log


def test_no_shape_is_a_negative(tmp_path):
    write(tmp_path)
    assert read_one(tmp_path)[0].objects == []


def test_shapes_that_enclose_something(tmp_path):
    write(
        tmp_path,
        shape("polygon", [[10, 10], [30, 10], [30, 30], [10, 30]]),
        shape("rectangle", [[50, 40], [20, 20]]),  # any two opposite corners
        shape("circle", [[40, 30], [40, 40]], "hole"),
    )
    image, log = read_one(tmp_path)
    rectangle, polygon, circle = image.objects
    assert (polygon.bbox_xywh, polygon.segmentation) == ((10, 10, 20, 20), [[10, 10, 30, 10, 30, 30, 10, 30]])
    assert (rectangle.bbox_xywh, rectangle.segmentation) == ((20, 20, 30, 20), None)
    assert circle.category == "hole"
    assert circle.decode((60, 80)).sum() == pytest.approx(np.pi * 100, rel=0.02)
    assert not list(log)


def test_points_and_lines_are_counted(tmp_path):
    write(
        tmp_path,
        shape("point", [[1, 1]]),
        shape("line", [[1, 1], [9, 9]]),
        shape("polygon", [[1, 1], [9, 9]]),
        shape("circle", [[1, 1]]),
    )
    image, log = read_one(tmp_path)
    assert image.objects == []
    assert log.count("skipped_shape") == 4


def test_a_group_is_one_object(tmp_path):
    first, second = [[0, 0], [10, 0], [10, 10], [0, 10]], [[20, 0], [30, 0], [30, 10], [20, 10]]
    write(
        tmp_path,
        shape("polygon", first, group_id=1),
        shape("polygon", second, group_id=1),
        shape("polygon", second, "hole", group_id=1),  # another label is another object
        shape("polygon", second),
    )
    image, _ = read_one(tmp_path)
    assert [(thing.category, len(thing.segmentation)) for thing in image.objects] == [
        ("crack", 2),
        ("hole", 1),
        ("crack", 1),
    ]


def test_splits_and_files_that_lack_their_partner(tmp_path):
    write(tmp_path / "train", shape("rectangle", [[1, 1], [9, 9]]))
    write(tmp_path / "val", stem="b")
    Image.new("RGB", (80, 60)).save(tmp_path / "val" / "unlabelled.png")
    write(tmp_path / "val", stem="c")
    (tmp_path / "val" / "c.png").unlink()
    log = FaultLog()
    labelled = read_labelme(tmp_path, None, log)
    assert {name: len(images) for name, images in labelled.splits.items()} == {"train": 1, "valid": 1}
    assert (log.count("unlabelled_image"), log.count("label_without_image")) == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"shapes": [', "not valid JSON"),
        ('{"images": []}', "not a LabelMe file"),
        ('{"shapes": [{"label": "", "points": []}]}', "shape 1: expected a label"),
        ('{"shapes": [{"label": "a", "points": [[1, 2, 3]]}]}', "shape 1: expected points"),
        ('{"shapes": [{"label": "a", "points": [[1, NaN]]}]}', "shape 1: points must be finite"),
    ],
)
def test_bad_file_is_named(tmp_path, text, message):
    path = write(tmp_path)
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_one(tmp_path)
    assert str(path) in str(error.value)
