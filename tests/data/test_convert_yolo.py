"""YOLO labels: what is read, what is repaired, what is refused by file and line, what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet, encode_bitmap
from sam3lora.data.convert.read_yolo import read_yolo
from sam3lora.data.convert.write_yolo import write_yolo
from sam3lora.errors import UserError


def write_image(path: Path, size_wh=(80, 60), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh, (90, 120, 150)).save(path, **options)
    return path


def write_set(root: Path, labels: dict[str, str | None], names: object = ("crack", "pothole")) -> Path:
    """`images/train/<stem>.png` of 80 x 60, `labels/train/<stem>.txt` (None: no file) and data.yaml."""
    (root / "labels" / "train").mkdir(parents=True)
    for stem, text in labels.items():
        write_image(root / "images" / "train" / f"{stem}.png")
        if text is not None:
            (root / "labels" / "train" / f"{stem}.txt").write_text(text)
    names = list(names) if isinstance(names, tuple) else names
    (root / "data.yaml").write_text(yaml.safe_dump({"names": names}))
    return root


def read(root: Path, names=None) -> tuple[list[LabelledImage], FaultLog]:
    log = FaultLog()
    return read_yolo(root, names, log).splits["train"], log


def test_empty_and_missing_label_files_are_negatives(tmp_path):
    images, log = read(write_set(tmp_path, {"a": "", "b": None}))
    assert [image.objects for image in images] == [[], []]
    # Only the missing file is worth a word.
    assert log.count("unlabelled_negative") == 1


def test_box_and_polygon_in_pixels(tmp_path):
    images, _ = read(write_set(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n0 0.25 0.5 0.5 0.5 0.5 1.0 0.25 1.0\n"}))
    box, polygon = images[0].objects
    assert (box.category, box.segmentation, box.bbox_xywh) == ("pothole", None, (30, 15, 20, 30))
    assert polygon.category == "crack"
    assert polygon.segmentation == [[20, 30, 40, 30, 40, 60, 20, 60]]
    assert polygon.bbox_xywh == (20, 30, 20, 30)


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_both_folder_layouts(tmp_path, layout):
    # "val" becomes the name that training looks for; the order is train, valid.
    for split in ("val", "train"):
        write_image(tmp_path / layout.format(kind="images", split=split) / "a.jpg")
        labels = tmp_path / layout.format(kind="labels", split=split)
        labels.mkdir(parents=True)
        (labels / "a.txt").write_text("0 .5 .5 .5 .5")
    labelled = read_yolo(tmp_path, ["crack"], FaultLog())
    assert list(labelled.splits) == ["train", "valid"]
    assert all(len(images[0].objects) == 1 for images in labelled.splits.values())


@pytest.mark.parametrize("names", [("a", "b", "c"), {2: "c", 0: "a", 1: "b"}])
def test_names_as_list_or_numbered(tmp_path, names):
    log = FaultLog()
    assert read_yolo(write_set(tmp_path, {"a": "2 .5 .5 .5 .5"}, names), None, log).categories == ["a", "b", "c"]


def test_classes_of_one_prompt_are_one_category(tmp_path):
    labelled = read_yolo(write_set(tmp_path, {"a": "1 .5 .5 .5 .5"}, ("Crack", "crack ")), None, FaultLog())
    assert labelled.categories == ["Crack"]
    assert labelled.splits["train"][0].objects[0].category == "Crack"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .5 .5", "class index 2 is not among 0..1"),
        ("0.5 .5 .5 .5 .5", "class index 0.5"),
        ("0 .5 .5 .5", "got 3"),
        ("0 .5 .5 .5 .5 .9", "confidence"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "got 7"),
        ("0 .5 .5 40 30", "coordinate 40 lies outside 0..1"),
        ("0 .5 .5 nan .5", "coordinate nan"),
        ("crack .5 .5 .5 .5", "expected numbers"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, message):
    root = write_set(tmp_path, {"a": f"0 .5 .5 .5 .5\n\n{line}\n"})
    with pytest.raises(UserError, match=message) as error:
        read(root)
    assert f"{root / 'labels' / 'train' / 'a.txt'}, line 3:" in str(error.value)


def test_slightly_outside_is_clipped_and_counted(tmp_path):
    # The box reaches 4 px over the left edge, the second only by rounding.
    images, log = read(write_set(tmp_path, {"a": "0 0.05 .5 .2 .5\n0 .5 .5 1.001 .5\n"}))
    assert images[0].objects[0].bbox_xywh == (0, 15, 12, 30)
    assert images[0].objects[1].bbox_xywh == (0, 15, 80, 30)
    assert log.count("outside") == 1


def test_repeated_and_empty_objects_are_dropped(tmp_path):
    images, log = read(write_set(tmp_path, {"a": "0 .5 .5 .5 .5\n0 .5 .5 .5 .5\n0 .5 .5 0 .5\n"}))
    assert len(images[0].objects) == 1
    assert (log.count("repeated_label"), log.count("empty_object")) == (1, 1)


def test_broken_image_and_label_without_image_are_left_out(tmp_path):
    root = write_set(tmp_path, {"a": "0 .5 .5 .5 .5", "b": "0 .5 .5 .5 .5"})
    (root / "images" / "train" / "b.png").write_bytes(b"no image")
    (root / "labels" / "train" / "c.txt").write_text("0 .5 .5 .5 .5")
    images, log = read(root)
    assert [image.path.stem for image in images] == ["a"]
    assert (log.count("unreadable_image"), log.count("label_without_image")) == (1, 1)


def test_labels_of_a_turned_photograph(tmp_path):
    # Labelling tools show it upright, 60 wide and 80 high; that is the size the shares refer to.
    exif = Image.Exif()
    exif[0x0112] = 6
    root = write_set(tmp_path, {"a": "0 .5 .5 .5 .5"})
    (root / "images" / "train" / "a.png").unlink()
    write_image(root / "images" / "train" / "a.jpg", exif=exif)
    images, _ = read(root)
    assert images[0].size_hw == (80, 60)
    assert images[0].objects[0].bbox_xywh == (15, 20, 30, 40)


def test_missing_names(tmp_path):
    root = write_set(tmp_path, {"a": "0 .5 .5 .5 .5"})
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match="--names"):
        read(root)
    assert read(root, ["crack"])[0][0].objects[0].category == "crack"
    (root / "data.yaml").write_text("names: [a, b")
    with pytest.raises(UserError, match=r"data\.yaml is not valid YAML"):
        read(root)


def write_one(tmp_path: Path, *objects: LabelledObject, boxes=False) -> tuple[list[str], FaultLog]:
    image = LabelledImage(write_image(tmp_path / "in" / "a.png"), (60, 80), list(objects))
    log = FaultLog()
    write_yolo(LabelledSet(["crack", "pothole"], {"train": [image]}), tmp_path / "out", log, boxes=boxes)
    return (tmp_path / "out" / "labels" / "train" / "a.txt").read_text().splitlines(), log


def test_writes_an_empty_file_for_a_negative(tmp_path):
    assert write_one(tmp_path)[0] == []
    description = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert description == {"train": "images/train", "names": {0: "crack", 1: "pothole"}}


def test_writes_boxes(tmp_path):
    lines, _ = write_one(tmp_path, LabelledObject("pothole", None, (30, 15, 20, 30)), boxes=True)
    assert lines == ["1 0.500000 0.500000 0.250000 0.500000"]


def test_parts_share_a_line_and_holes_are_filled(tmp_path):
    mask = np.zeros((60, 80), dtype=bool)
    mask[5:20, 5:20] = True
    mask[10:12, 10:12] = False  # the hole
    mask[30:50, 40:70] = True  # a second part
    mask[55, 2] = True  # a part of one pixel
    lines, log = write_one(tmp_path, LabelledObject("crack", encode_bitmap(mask), (2, 5, 68, 51)))
    assert len(lines) == 1
    assert log.count("hole") == 1
    back, _ = read(tmp_path / "out")
    mask[10:12, 10:12] = True
    np.testing.assert_array_equal(back[0].objects[0].decode((60, 80)), mask)


def test_box_without_mask_becomes_a_rectangle_and_is_counted(tmp_path):
    lines, log = write_one(tmp_path, LabelledObject("crack", None, (20, 30, 20, 30)))
    assert len(lines[0].split()) == 9
    assert log.count("box_as_mask") == 1


def test_conversion_to_coco_and_back_keeps_names_and_negatives(tmp_path):
    text = "1 0.250000 0.500000 0.500000 0.500000 0.500000 1.000000 0.250000 1.000000\n"
    root = write_set(tmp_path / "in", {"a": text, "b": None}, ("unused", "crack"))
    convert_folder(root, tmp_path / "coco")
    report = convert_folder(tmp_path / "coco", tmp_path / "yolo", target_format="yolo")
    assert report.splits["train"]["num_negatives"] == 1
    # A class that nothing uses keeps its number: models may have been trained on the list.
    assert yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())["names"] == {0: "unused", 1: "crack"}
    assert (tmp_path / "yolo" / "labels" / "train" / "a.txt").read_text() == text
    assert (tmp_path / "yolo" / "labels" / "train" / "b.txt").read_text() == ""
