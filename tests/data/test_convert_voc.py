"""Pascal VOC boxes: corners that count from 1, splits, and XML that cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam3lora.data.convert.voc import read_voc
from sam3lora.errors import UserError

from .convert_cases import read_first, read_set, write_image

SIZE = "<size><width>80</width><height>60</height><depth>3</depth></size>"


def entry(name="crack", box=(11, 21, 30, 40), extra="") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_pair(images: Path, labels: Path, stem: str, content: str = "", size=SIZE) -> None:
    write_image(images / f"{stem}.jpg")
    labels.mkdir(exist_ok=True)
    (labels / f"{stem}.xml").write_text(f"<annotation>{size}{content}</annotation>")


def test_no_object_is_a_negative(tmp_path):
    write_pair(tmp_path, tmp_path, "a")
    labelled, _ = read_set(read_voc, tmp_path)
    assert labelled.categories == []
    assert labelled.splits["."][0].objects == []


def test_pixels_are_numbered_from_one(tmp_path):
    write_pair(tmp_path, tmp_path, "a", entry(box=(1, 1, 80, 60)) + entry("Apple", extra="<difficult>1</difficult>"))
    labelled, faults = read_set(read_voc, tmp_path)
    whole, part = labelled.splits["."][0].objects
    assert (whole.bbox_xywh, part.bbox_xywh) == ((0, 0, 80, 60), (10, 20, 20, 20))
    assert whole.segmentation is None
    assert labelled.categories == ["Apple", "crack"]
    assert faults == {"difficult": 1}


def test_splits_of_the_development_kit(tmp_path):
    for stem in "abc":
        write_pair(tmp_path / "JPEGImages", tmp_path / "Annotations", stem, entry())
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\nmissing\n")
    (lists / "crack_train.txt").write_text("a 1\n")  # a list of one category is not a split
    labelled, faults = read_set(read_voc, tmp_path)
    stems = {split: [image.path.stem for image in images] for split, images in labelled.splits.items()}
    assert stems == {"train": ["a", "c"], "valid": ["b"]}
    assert faults == {"unlabelled_image": 1}


def test_one_folder_per_split_with_files_without_their_partner(tmp_path):
    train = tmp_path / "train"
    for stem in ("a", "image_only", "label_only"):
        write_pair(train, train, stem, entry())
    (train / "image_only.xml").unlink()
    (train / "label_only.jpg").unlink()
    labelled, faults = read_set(read_voc, tmp_path, ["pothole", "crack"])
    # an image without XML may show anything, so it is not a negative
    assert [image.path.stem for image in labelled.splits["train"]] == ["a"]
    assert faults == {"unlabelled_image": 1, "label_without_image": 1}
    assert labelled.categories == ["pothole", "crack"]
    with pytest.raises(UserError, match=r"crack.*--names"):
        read_set(read_voc, tmp_path, ["pothole"])


def test_size_of_the_label_file_is_the_one_that_coordinates_refer_to(tmp_path):
    size = "<size><width>40</width><height>30</height></size>"
    write_pair(tmp_path, tmp_path, "a", entry(box=(1, 1, 40, 30)), size)
    image, faults = read_first(read_voc, tmp_path)
    assert (image.size_hw, image.objects[0].bbox_xywh) == ((30, 40), (0, 0, 40, 30))
    assert faults == {"label_size_mismatch": 1}


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (f"<annotation>{SIZE}<object>".encode(), "truncated"),
        (b"", "truncated"),
        (b"<html/>", "annotation.*html"),
        (f"<annotation>{entry(box=(1, 'x', 3, 4))}</annotation>".encode(), "object 1: .*bndbox/ymin"),
        (f"<annotation>{entry(name='')}</annotation>".encode(), "object 1: .*name"),
        # entities could grow without limit or read other files, in any encoding
        (b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "DOCTYPE"),
        (
            '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY e "x">]><annotation/>'.encode("utf-16"),
            "DOCTYPE",
        ),
    ],
)
def test_invalid_xml_is_named(tmp_path, content, place):
    write_pair(tmp_path, tmp_path, "a")
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(UserError, match=place) as error:
        read_set(read_voc, tmp_path)
    assert str(tmp_path / "a.xml") in str(error.value)
