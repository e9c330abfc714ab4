"""YOLO labels: what is read, what is repaired, what is refused with file and line, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet
from sam3lora.data.convert.run import guess_format
from sam3lora.data.convert.yolo import read_yolo, write_yolo
from sam3lora.data.faults import FaultLog
from sam3lora.data.rle import encode_rle
from sam3lora.errors import UserError

from .convert_cases import counts, mask_with, read_set, write_image

BOX = "0 .5 .5 .5 .5"


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


def read(root: Path, names=None) -> tuple[list[LabelledImage], dict[str, int]]:
    labelled, faults = read_set(read_yolo, root, names)
    return labelled.splits["train"], faults


def test_box_and_polygon_in_pixels_and_negatives(tmp_path):
    labels = {"a": "1 0.5 0.5 0.25 0.5\n0 0.25 0.5 0.5 0.5 0.5 1.0 0.25 1.0\n", "b": "", "c": None}
    images, faults = read(write_set(tmp_path, labels))
    box, polygon = images[0].objects
    assert (box.category, box.segmentation, box.bbox_xywh) == ("pothole", None, (30, 15, 20, 30))
    assert polygon.category == "crack"
    assert polygon.segmentation == [[20, 30, 40, 30, 40, 60, 20, 60]]
    assert polygon.bbox_xywh == (20, 30, 20, 30)
    assert [image.objects for image in images[1:]] == [[], []]
    assert faults == {"unlabelled_negative": 1}  # the missing file only


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_both_folder_layouts(tmp_path, layout):
    # "val" becomes "valid", the name that training looks for; train comes first
    for split in ("val", "train"):
        write_image(tmp_path / layout.format(kind="images", split=split) / "a.jpg")
        labels = tmp_path / layout.format(kind="labels", split=split)
        labels.mkdir(parents=True)
        (labels / "a.txt").write_text(BOX)
    labelled, _ = read_set(read_yolo, tmp_path, ["crack"])
    assert list(labelled.splits) == ["train", "valid"]
    assert all(len(images[0].objects) == 1 for images in labelled.splits.values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a", "b", "c"), ["a", "b", "c"]),
        ({2: "c", 0: "a", 1: "b"}, ["a", "b", "c"]),
        # names that are the same prompt are one category, in the first spelling
        (("Crack", "other", "crack "), ["Crack", "other"]),
    ],
)
def test_names_of_the_description(tmp_path, names, expected):
    labelled, _ = read_set(read_yolo, write_set(tmp_path, {"a": "2 .5 .5 .5 .5"}, names))
    assert labelled.categories == expected
    assert labelled.splits["train"][0].objects[0].category == (expected * 2)[2]


def write_pair(root: Path, image: str, text: str | None = BOX) -> None:
    """An image, and its label file in the folder `labels` in place of `images`."""
    write_image(root / image)
    label = root / Path(image.replace("images/", "labels/")).with_suffix(".txt")
    label.parent.mkdir(parents=True, exist_ok=True)
    if text is not None:
        label.write_text(text)


def describe(root: Path, **content: object) -> Path:
    (root / "data.yaml").write_text(yaml.safe_dump({"names": ["crack"], **content}))
    return root


def split_paths(root: Path, labelled: LabelledSet) -> dict[str, list[str]]:
    return {
        split: [image.path.relative_to(root).as_posix() for image in images]
        for split, images in labelled.splits.items()
    }


@pytest.mark.parametrize("layout", ["images/train/{}", "train/images/{}"])
def test_images_in_folders_within_a_split(tmp_path, layout):
    # equal names in two folders stay apart, each with its own label
    source = tmp_path / "in"
    for place, x in (("cam1/0.jpg", 0.25), ("cam2/0.jpg", 0.75), ("cam2/deep/1.jpg", 0.5), ("top.jpg", 0.5)):
        write_pair(source, layout.format(place), f"0 {x} .5 .25 .5")
    labels = source / layout.format("cam1/none.jpg").replace("images", "labels")
    labels.with_suffix(".txt").write_text(BOX)
    labelled, faults = read_set(read_yolo, source, ["crack"])
    boxes = {image.path.relative_to(source).as_posix(): image.objects[0].bbox_xywh[0] for image in labelled.images()}
    centres = {"cam1/0.jpg": 20, "cam2/0.jpg": 60, "cam2/deep/1.jpg": 40, "top.jpg": 40}
    assert boxes == {layout.format(place): x - 10 for place, x in centres.items()}
    assert faults == {"label_without_image": 1}
    report = convert_folder(source, tmp_path / "out", names=["crack"])
    assert report.splits["train"]["num_objects"] == 4
    written = json.loads((tmp_path / "out" / "train" / "_annotations.coco.json").read_text())
    assert len({entry["file_name"] for entry in written["images"]}) == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Ultralytics: relative to path, which may be that of another machine
        ({"path": ".", "train": "images/a", "val": "images/b"}, {"train": "a", "valid": "b"}),
        ({"path": "../datasets/cracks", "train": "images/a", "val": "images/b"}, {"train": "a", "valid": "b"}),
        # Roboflow: relative to a folder beside data.yaml; test is named whether or not it is there
        ({"train": "../images/a", "val": "../images/b", "test": "../test/images"}, {"train": "a", "valid": "b"}),
        ({"train": ["images/a", "images/b"], "test": "images/c"}, {"train": "ab", "test": "c"}),
        ({"train": "train.txt", "val": "lists/val.txt"}, {"train": "ac", "valid": "b"}),
        # the same images as training and validation images: there are no splits
        ({"train": "images/a", "val": "images/a"}, {".": "a"}),
    ],
)
def test_splits_that_the_description_names(tmp_path, content, expected):
    for name in "abc":
        write_pair(tmp_path, f"images/{name}/{name}.jpg")
    (tmp_path / "train.txt").write_text("./images/a/a.jpg\n\nimages/c/c.jpg\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text("images/b/b.jpg\n../images/b/gone.jpg\n")
    labelled, faults = read_set(read_yolo, describe(tmp_path, **content))
    found = {split: "".join(sorted(image.path.stem for image in images)) for split, images in labelled.splits.items()}
    rest = set("abc") - set("".join(expected.values()))
    assert found == expected | {name: name for name in rest}  # folders that no list touches are splits, as without one
    assert all(image.objects for image in labelled.images())
    named = [*content.values()]
    lost = ["missing_split"] * ("../test/images" in named) + ["missing_image"] * ("lists/val.txt" in named)
    assert faults == dict.fromkeys(lost, 1)
    assert guess_format(tmp_path) == "yolo"


def test_images_that_the_lists_leave_out_are_counted(tmp_path):
    for name in "ab":
        write_pair(tmp_path, f"images/{name}.jpg")
    (tmp_path / "train.txt").write_text("images/a.jpg")
    labelled, faults = read_set(read_yolo, describe(tmp_path, train="train.txt"))
    assert split_paths(tmp_path, labelled) == {"train": ["images/a.jpg"]}
    assert faults == {"unlisted_image": 1}


def test_labels_beside_the_images(tmp_path):
    write_pair(tmp_path, "frames/a.jpg")
    labelled, faults = read_set(read_yolo, describe(tmp_path, train="frames"))
    assert [len(image.objects) for image in labelled.splits["train"]] == [1]
    assert faults == {}


def test_pose_files_are_refused(tmp_path):
    # a box and four key points with their visibility look like a polygon of eight points
    source = tmp_path / "in"
    write_pair(source, "images/train/a.jpg", "0 .5 .5 .5 .5" + " .4 .4 1" * 4)
    for shape in ([4, 3], [17, 2]):
        with pytest.raises(UserError, match=r"data\.yaml has kpt_shape"):
            convert_folder(describe(source, kpt_shape=shape), tmp_path / "out")
    # corners of turned boxes are a polygon
    write_pair(source, "images/train/a.jpg", "0 .25 .25 .5 .25 .5 .5 .25 .5")
    labelled, _ = read_set(read_yolo, describe(source))
    assert labelled.splits["train"][0].objects[0].segmentation == [[20, 15, 40, 15, 40, 30, 20, 30]]


@pytest.mark.parametrize(
    "text",
    ["names: !!python/object:os.system x", "a: [" + "[" * 5000, "names: 1" + "0" * 5000, "names: {1: a, [2]: b}"],
    ids=["object", "deep", "long", "key"],
)
def test_a_hostile_description_is_one_message(tmp_path, text):
    write_pair(tmp_path, "images/train/a.jpg")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.yaml"):
        read_set(read_yolo, tmp_path)


def test_an_image_whose_only_label_is_lost_is_no_negative(tmp_path):
    # an empty box; beside another object of its category it costs nothing, and of another one it does
    empty = "0 .5 .5 0 .5"
    labels = {"lost": empty, "kept": f"{empty}\n{BOX}", "other": f"{empty}\n1 .5 .5 .5 .5", "negative": ""}
    report = convert_folder(write_set(tmp_path / "in", labels), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "train").glob("*.png")} == {"kept.png", "negative.png"}
    assert {fault.kind: fault.count for fault in report.faults} == {
        "empty_object": 3,
        "incomplete_image": 2,
        "left_out_label": 1,
    }


def test_missing_or_invalid_names(tmp_path):
    root = write_set(tmp_path, {"a": BOX})
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match="--names"):
        read(root)
    assert read(root, ["crack"])[0][0].objects[0].category == "crack"
    # the sources of names, by precedence
    for file, text in (("classes.txt", "hole\n\n"), ("a.yaml", "names: [a]"), ("data.yaml", "names: [data]")):
        (root / file).write_text(text)
        expected = "hole" if file == "classes.txt" else file.removesuffix(".yaml")
        assert read(root)[0][0].objects[0].category == expected
    for text in ("names: [a, b", "names: {a: crack}", "names: crack", "names: [1]"):
        (root / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=r"data\.yaml"):
            read(root)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("2 .5 .5 .5 .5", "class index 2 "),
        ("0.5 .5 .5 .5 .5", "class index 0.5"),
        ("0 .5 .5 .5", "got 3"),
        ("0 .5 .5 .5 .5 .9", "got 5.*confidence"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "got 7"),
        ("0 .5 .5 40 30", "coordinate 40"),
        ("0 .5 .5 nan .5", "coordinate nan"),
        ("crack .5 .5 .5 .5", "numbers.*crack"),
    ],
)
def test_invalid_line_is_named(tmp_path, line, value):
    root = write_set(tmp_path, {"a": f"{BOX}\n\n{line}\n"})
    with pytest.raises(UserError, match=value) as error:
        read(root)
    assert f"{root / 'labels' / 'train' / 'a.txt'}, line 3:" in str(error.value)


def test_what_is_repaired_or_left_out_is_counted(tmp_path):
    # the first box reaches 4 px over the left edge, the second less than a pixel; repeated and empty objects go
    labels = {"a": f"0 0.05 .5 .2 .5\n0 .5 .5 1.001 .5\n{BOX}\n{BOX}\n0 .5 .5 0 .5\n", "b": BOX}
    root = write_set(tmp_path, labels)
    (root / "images" / "train" / "b.png").write_bytes(b"no image")
    (root / "labels" / "train" / "c.txt").write_text(BOX)
    [image], faults = read(root)
    assert [thing.bbox_xywh for thing in image.objects] == [(0, 15, 12, 30), (0, 15, 80, 30), (20, 15, 40, 30)]
    dropped = {"repeated_label": 1, "empty_object": 1, "broken_source_image": 1, "label_without_image": 1}
    assert faults == {"out_of_bounds": 1} | dropped


@pytest.mark.parametrize(
    ("orientation", "size_hw", "num_turned"), [(6, (80, 60), 0), (5, (80, 60), 0), (3, (60, 80), 1), (4, (60, 80), 1)]
)
def test_labels_of_a_photograph_with_an_orientation(tmp_path, orientation, size_hw, num_turned):
    # labelling tools show a photograph turned by 90 degrees upright: the shares refer to that size
    exif = Image.Exif()
    exif[0x0112] = orientation
    root = write_set(tmp_path, {"a": BOX})
    (root / "images" / "train" / "a.png").unlink()
    write_image(root / "images" / "train" / "a.jpg", exif=exif)
    images, faults = read(root)
    height, width = size_hw
    assert images[0].size_hw == size_hw
    assert images[0].objects[0].bbox_xywh == (width / 4, height / 4, width / 2, height / 2)
    assert faults.get("turned_image", 0) == num_turned


def write_one(tmp_path: Path, *objects: LabelledObject, boxes=False) -> tuple[list[str], dict[str, int]]:
    image = LabelledImage(write_image(tmp_path / "in" / "a.png"), (60, 80), list(objects))
    log = FaultLog()
    write_yolo(LabelledSet(["crack", "pothole"], {"train": [image]}), tmp_path / "out", log, boxes=boxes)
    return (tmp_path / "out" / "labels" / "train" / "a.txt").read_text().splitlines(), counts(log)


def test_an_object_with_only_a_box_is_written_as_a_box_or_a_rectangle(tmp_path):
    lines, faults = write_one(tmp_path / "boxes", LabelledObject("pothole", None, (30, 15, 20, 30)), boxes=True)
    assert (lines, faults) == (["1 0.500000 0.500000 0.250000 0.500000"], {})
    lines, faults = write_one(tmp_path / "polygons", LabelledObject("crack", None, (20, 30, 20, 30)))
    assert (len(lines[0].split()), faults) == (9, {"box_as_mask": 1})


def test_parts_share_a_line_and_holes_are_filled(tmp_path):
    block, hole = (slice(5, 20), slice(5, 20)), (slice(10, 12), slice(10, 12))
    mask = mask_with(block, (slice(30, 50), slice(40, 70)), (55, 2), size_hw=(60, 80))  # three parts
    mask[hole] = False
    lines, faults = write_one(tmp_path, LabelledObject("crack", encode_rle(mask), (2, 5, 68, 51)))
    assert (len(lines), faults) == (1, {"hole": 1})
    mask[hole] = True
    np.testing.assert_array_equal(read(tmp_path / "out")[0][0].objects[0].decode((60, 80)), mask)


def test_conversion_to_coco_and_back_keeps_names_and_negatives(tmp_path):
    text = "1 0.250000 0.500000 0.500000 0.500000 0.500000 1.000000 0.250000 1.000000\n"
    root = write_set(tmp_path / "in", {"a": text, "b": None}, ("unused", "crack"))
    convert_folder(root, tmp_path / "coco")
    report = convert_folder(tmp_path / "coco", tmp_path / "yolo", target_format="yolo")
    assert report.splits["train"]["num_negatives"] == 1
    # an unused class keeps its number: models may have been trained on the list
    description = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert description == {"train": "images/train", "names": {0: "unused", 1: "crack"}}
    assert (tmp_path / "yolo" / "labels" / "train" / "a.txt").read_text() == text
    assert (tmp_path / "yolo" / "labels" / "train" / "b.txt").read_text() == ""
