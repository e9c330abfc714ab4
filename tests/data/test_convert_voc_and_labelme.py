"""Pascal VOC and LabelMe, one label file an image: objects, sizes, splits, partners, and untrusted files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.labelme import read_labelme
from sam3lora.data.convert.voc import read_voc
from sam3lora.errors import UserError

from .convert_cases import read_first, read_set, write_image

SIZE = "<size><width>80</width><height>60</height><depth>3</depth></size>"


def entry(name="crack", box=(11, 21, 30, 40), extra="") -> str:
    """An object of a VOC file; corners count from 1."""
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def shape(kind: str, points: list, label="crack", group_id=None) -> dict:
    """An object of a LabelMe file."""
    return {"label": label, "points": points, "shape_type": kind, "group_id": group_id}


def write_voc(folder: Path, *entries: str, stem="a", size=SIZE, images: Path | None = None) -> Path:
    write_image((images or folder) / f"{stem}.png")
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.xml"
    path.write_text(f"<annotation>{size}{''.join(entries)}</annotation>")
    return path


def write_labelme(folder: Path, *shapes: dict, stem="a", **changes) -> Path:
    write_image(folder / f"{stem}.png")
    content = {"shapes": list(shapes), "imagePath": f"..\\{stem}.png", "imageHeight": 60, "imageWidth": 80}
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


FORMATS = pytest.mark.parametrize(
    ("read", "write", "thing", "half_size"),
    [
        (
            read_voc,
            write_voc,
            entry(box=(1, 1, 40, 30)),
            {"size": "<size><width>40</width><height>30</height></size>"},
        ),
        (
            read_labelme,
            write_labelme,
            shape("rectangle", [[0, 0], [40, 30]]),
            {"imageHeight": 30, "imageWidth": 40},
        ),
    ],
    ids=["voc", "labelme"],
)


@FORMATS
def test_objects_negatives_and_the_size_that_coordinates_refer_to(tmp_path, read, write, thing, half_size):
    write(tmp_path / "empty")
    assert read_first(read, tmp_path / "empty")[0].objects == []
    write(tmp_path / "half", thing, **half_size)
    image, faults = read_first(read, tmp_path / "half")
    assert (image.size_hw, image.objects[0].bbox_xywh) == ((30, 40), (0, 0, 40, 30))
    assert faults == {"label_size_mismatch": 1}


@FORMATS
def test_splits_and_files_without_their_partner(tmp_path, read, write, thing, half_size):
    write(tmp_path / "train", thing)
    write(tmp_path / "val", stem="b")
    write_image(tmp_path / "val" / "unlabelled.png")
    write(tmp_path / "val", stem="c")
    (tmp_path / "val" / "c.png").unlink()
    labelled, faults = read_set(read, tmp_path, ["pothole", "crack"])
    # an image without labels may show anything, so it is not a negative
    assert {name: len(images) for name, images in labelled.splits.items()} == {"train": 1, "valid": 1}
    assert faults == {"unlabelled_image": 1, "label_without_image": 1}
    assert labelled.categories == ["pothole", "crack"]
    with pytest.raises(UserError, match=r"crack.*--names"):
        read_set(read, tmp_path, ["pothole"])


@pytest.mark.parametrize(
    ("read", "content", "place"),
    [
        (read_voc, f"<annotation>{SIZE}<object>", "truncated"),
        (read_voc, "", "truncated"),
        (read_voc, "<html/>", "annotation.*html"),
        (read_voc, f"<annotation>{entry(box=(1, 'x', 3, 4))}</annotation>", "object 1: .*bndbox/ymin"),
        (read_voc, f"<annotation>{entry(name='')}</annotation>", "object 1: .*name"),
        # entities could grow without limit or read other files, in any encoding
        (read_voc, '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "DOCTYPE"),
        (
            read_voc,
            '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY e "x">]><annotation/>'.encode("utf-16"),
            "DOCTYPE",
        ),
        (read_labelme, '{"shapes": [', "truncated"),
        (read_labelme, '{"images": []}', "shapes"),
        (read_labelme, '{"shapes": [{"label": "", "points": []}]}', "shape 1: .*label"),
        (read_labelme, '{"shapes": [{"label": "a", "points": [[1, 2, 3]]}]}', "shape 1: .*points"),
        (read_labelme, '{"shapes": [{"label": "a", "points": [[1, NaN]]}]}', "shape 1: .*finite"),
    ],
)
def test_invalid_file_is_named(tmp_path, read, content, place):
    path = (write_voc if read is read_voc else write_labelme)(tmp_path)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=place) as error:
        read_set(read, tmp_path)
    assert str(path) in str(error.value)


def test_voc_pixels_are_numbered_from_one(tmp_path):
    write_voc(tmp_path, entry(box=(1, 1, 80, 60)), entry("Apple", extra="<difficult>1</difficult>"))
    labelled, faults = read_set(read_voc, tmp_path)
    whole, part = labelled.splits["."][0].objects
    assert (whole.bbox_xywh, part.bbox_xywh) == ((0, 0, 80, 60), (10, 20, 20, 20))
    assert whole.segmentation is None
    assert labelled.categories == ["Apple", "crack"]
    assert faults == {"difficult": 1}


def test_voc_splits_of_the_development_kit(tmp_path):
    for stem in "abc":
        write_voc(tmp_path / "Annotations", entry(), stem=stem, images=tmp_path / "JPEGImages")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\nmissing\n")
    (lists / "crack_train.txt").write_text("a 1\n")  # a list of one category is not a split
    labelled, faults = read_set(read_voc, tmp_path)
    stems = {split: [image.path.stem for image in images] for split, images in labelled.splits.items()}
    assert stems == {"train": ["a", "c"], "valid": ["b"]}
    assert faults == {"unlabelled_image": 1}


def test_labelme_shapes(tmp_path):
    write_labelme(
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
    # shapes without area are counted
    kinds = [("point", 1), ("line", 2), ("polygon", 2), ("circle", 1), ("rectangle", 1)]
    write_labelme(tmp_path, *(shape(kind, [[1, 1], [9, 9]][:num_points]) for kind, num_points in kinds))
    image, faults = read_first(read_labelme, tmp_path)
    assert (image.objects, faults) == ([], {"skipped_shape": 5})


def test_labelme_polygons_of_a_group_are_one_object(tmp_path):
    first, second = [[0, 0], [10, 0], [10, 10], [0, 10]], [[20, 0], [30, 0], [30, 10], [20, 10]]
    write_labelme(
        tmp_path,
        shape("polygon", first, group_id=1),
        shape("polygon", second, group_id=1),
        shape("polygon", second, "hole", group_id=1),  # another label is another object
        shape("polygon", second),
    )
    objects = read_first(read_labelme, tmp_path)[0].objects
    assert [(thing.category, len(thing.segmentation)) for thing in objects] == [("crack", 2), ("hole", 1), ("crack", 1)]


@pytest.mark.parametrize("layout", ["Annotations", "train"])
def test_voc_in_folders_within_a_split(tmp_path, layout):
    for folder, box in (("cam1", (1, 1, 10, 10)), ("cam2", (11, 11, 20, 20))):
        labels = tmp_path / layout / folder
        labels.mkdir(parents=True)
        images = tmp_path / "JPEGImages" / folder if layout == "Annotations" else labels
        write_voc(labels, entry(box=box), images=images)
    labelled, faults = read_set(read_voc, tmp_path)
    [images] = labelled.splits.values()
    assert {image.path.parent.name: image.objects[0].bbox_xywh[0] for image in images} == {"cam1": 0, "cam2": 10}
    assert faults == {}


def test_voc_images_that_no_list_names_are_counted(tmp_path):
    (tmp_path / "Annotations").mkdir()
    for stem in "ab":
        write_voc(tmp_path / "Annotations", entry(), stem=stem, images=tmp_path / "JPEGImages")
    write_image(tmp_path / "JPEGImages" / "a.jpg")  # besides a.png, with one label file for both
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a")
    labelled, faults = read_set(read_voc, tmp_path)
    assert [len(images) for images in labelled.splits.values()] == [1]
    assert faults == {"unlisted_image": 1, "unlabelled_image": 1}


def test_voc_boxes_that_are_lost_make_no_negatives(tmp_path):
    for stem, box in (("kept", (1, 1, 10, 10)), ("lost", (500, 500, 510, 510)), ("huge", (1, 1, 1e300, 1e300))):
        write_voc(tmp_path / "in", entry(box=box), stem=stem)
    report = convert_folder(tmp_path / "in", tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"kept", "huge"}
    faults = {fault.kind: fault.count for fault in report.faults}
    assert faults == {"out_of_bounds": 2, "empty_object": 1, "incomplete_image": 1}


def test_voc_label_of_an_impossible_image_size(tmp_path):
    path = write_voc(tmp_path, entry(), size="<size><width>1e9</width><height>1e9</height></size>")
    with pytest.raises(UserError, match=rf"{path.name}.*1000000000 x 1000000000"):
        read_set(read_voc, tmp_path)
