"""Pascal VOC boxes: corners that count from 1, splits, and XML that cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.read_voc import read_voc
from sam3lora.errors import UserError

SIZE = "<size><width>80</width><height>60</height><depth>3</depth></size>"


def entry(name="crack", box=(11, 21, 30, 40), extra="") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_pair(images: Path, labels: Path, stem: str, content: str = "", size=SIZE) -> None:
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60)).save(images / f"{stem}.jpg")
    (labels / f"{stem}.xml").write_text(f"<annotation>{size}{content}</annotation>")


def test_no_object_is_a_negative(tmp_path):
    write_pair(tmp_path, tmp_path, "a")
    labelled = read_voc(tmp_path, None, FaultLog())
    assert labelled.categories == []
    assert labelled.splits["."][0].objects == []


def test_first_pixel_is_number_one(tmp_path):
    write_pair(tmp_path, tmp_path, "a", entry(box=(1, 1, 80, 60)) + entry("Apple", extra="<difficult>1</difficult>"))
    log = FaultLog()
    labelled = read_voc(tmp_path, None, log)
    whole, part = labelled.splits["."][0].objects
    assert (whole.bbox_xywh, part.bbox_xywh) == ((0, 0, 80, 60), (10, 20, 20, 20))
    assert whole.segmentation is None
    assert labelled.categories == ["Apple", "crack"]
    assert log.count("difficult") == 1


def test_splits_of_the_development_kit(tmp_path):
    images, labels = tmp_path / "JPEGImages", tmp_path / "Annotations"
    for stem in "abc":
        write_pair(images, labels, stem, entry())
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\nmissing\n")
    (lists / "crack_train.txt").write_text("a 1\n")  # per-category lists are no splits
    log = FaultLog()
    labelled = read_voc(tmp_path, None, log)
    assert {split: [i.path.stem for i in images] for split, images in labelled.splits.items()} == {
        "train": ["a", "c"],
        "valid": ["b"],
    }
    assert log.count("unlabelled_image") == 1


def test_a_folder_a_split_with_files_that_lack_their_partner(tmp_path):
    train = tmp_path / "train"
    write_pair(train, train, "a", entry())
    write_pair(train, train, "image_only")
    write_pair(train, train, "label_only")
    (train / "image_only.xml").unlink()
    (train / "label_only.jpg").unlink()
    log = FaultLog()
    labelled = read_voc(tmp_path, ["pothole", "crack"], log)
    # An image without XML may show anything: it is no negative.
    assert [image.path.stem for image in labelled.splits["train"]] == ["a"]
    assert (log.count("unlabelled_image"), log.count("label_without_image")) == (1, 1)
    assert labelled.categories == ["pothole", "crack"]
    with pytest.raises(UserError, match="crack, which --names lacks"):
        read_voc(tmp_path, ["pothole"], FaultLog())


def test_size_of_the_label_counts(tmp_path):
    # Labelled at half size: coordinates refer to 40 x 30.
    size = "<size><width>40</width><height>30</height></size>"
    write_pair(tmp_path, tmp_path, "a", entry(box=(1, 1, 40, 30)), size)
    log = FaultLog()
    image = read_voc(tmp_path, None, log).splits["."][0]
    assert (image.size_hw, image.objects[0].bbox_xywh) == ((30, 40), (0, 0, 40, 30))
    assert log.count("size_mismatch") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"<annotation>{SIZE}<object>", "not valid XML"),
        ("", "not valid XML"),
        ("<html/>", "expected a Pascal VOC <annotation>, got <html>"),
        (f"<annotation>{entry(box=(1, 'x', 3, 4))}</annotation>", "object 1: expected a number in <bndbox/ymin>"),
        (f"<annotation>{entry(name='')}</annotation>", "object 1: no <name>"),
        # Entities could grow without bound or read other files.
        ('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "DOCTYPE"),
    ],
)
def test_bad_xml_is_named(tmp_path, text, message):
    write_pair(tmp_path, tmp_path, "a")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_voc(tmp_path, None, FaultLog())
    assert str(tmp_path / "a.xml") in str(error.value)


def test_doctype_in_another_encoding_is_refused_too(tmp_path):
    write_pair(tmp_path, tmp_path, "a")
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY e "x">]><annotation/>'
    (tmp_path / "a.xml").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match="DOCTYPE"):
        read_voc(tmp_path, None, FaultLog())
