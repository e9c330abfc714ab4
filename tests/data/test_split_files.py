"""Finding the splits of COCO data sets in the layouts that tools export, with the images they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.check import check_folder
from sam3lora.data.convert import convert_folder
from sam3lora.data.split.splitting import split_folder
from sam3lora.data.split_files import (
    WHOLE,
    find_split,
    find_split_or_whole,
    find_splits,
    missing_split,
    required_split,
    split_of_file,
)
from sam3lora.errors import UserError

from .coco_builder import annotation
from .convert_cases import write_image

OURS = "_annotations.coco.json"


def write_coco(path: Path, *file_names: str, images: Path | None = None) -> Path:
    """An annotation file with a crack on each image, and the images where they are relative to (None: beside it)."""
    entries = [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(file_names)]
    content = {
        "images": entries,
        "annotations": [annotation(i, i) for i in range(len(entries))],
        "categories": [{"id": 1, "name": "crack"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for number, name in enumerate(file_names):
        image = (images or path.parent) / name.replace("\\", "/")
        image.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
    return path


def paths_of(root: Path, split: str) -> list[str]:
    """Where the images of a split are, relative to the root."""
    found = required_split(root, split).read()
    return [str(Path(path).relative_to(root)) for path in found.table.column("path").to_pylist()]


@pytest.mark.parametrize("folder", ["val", "validation", "Valid", "valid", "val2017"])
def test_spellings_of_the_validation_folder(tmp_path, folder):
    write_coco(tmp_path / folder / OURS, "a.png")
    assert paths_of(tmp_path, "valid") == [f"{folder}/a.png"]
    assert find_split(tmp_path, "train") is None


def test_of_two_validation_folders_the_one_called_so_wins(tmp_path):
    for folder in ("val", "validation"):
        write_coco(tmp_path / folder / OURS, "a.png")
    with pytest.raises(UserError, match=r"val/.* and .*validation/.*data\.valid_split"):
        find_split(tmp_path, "valid")
    assert paths_of(tmp_path, "validation") == ["validation/a.png"]
    write_coco(tmp_path / "valid" / OURS, "a.png")
    assert paths_of(tmp_path, "valid") == ["valid/a.png"]
    assert paths_of(tmp_path, "val") == ["val/a.png"]
    assert [split.name for split in find_splits(tmp_path)] == ["val", "valid", "validation"]


@pytest.mark.parametrize("images", ["{}2017", "images/{}2017"])
def test_layout_of_coco(tmp_path, images):
    # the same file name in both splits: each finds its own; files of COCO's other tasks are not taken
    for split in ("train", "val"):
        names = [f"instances_{split}2017", f"person_keypoints_{split}2017", f"captions_{split}2017"]
        for name in (*names, f"panoptic_{split}2017", f"stuff_{split}2017"):
            folder = tmp_path / images.format(split)
            write_coco(tmp_path / "annotations" / f"{name}.json", "000000000009.jpg", images=folder)
    write_coco(tmp_path / "annotations" / "image_info_test2017.json")
    assert paths_of(tmp_path, "train") == [images.format("train") + "/000000000009.jpg"]
    assert paths_of(tmp_path, "valid") == [images.format("val") + "/000000000009.jpg"]
    assert [split.name for split in find_splits(tmp_path)] == ["train2017", "val2017"]


def test_two_years_of_coco_are_told_apart_by_name(tmp_path):
    root = tmp_path / "set"
    for year in (2014, 2017):
        write_coco(root / "annotations" / f"instances_train{year}.json", "a.jpg", images=root / f"train{year}")
    with pytest.raises(
        UserError, match=r"instances_train2014\.json and .*instances_train2017\.json.*data\.train_split"
    ):
        find_split(root, "train")
    assert paths_of(root, "train2014") == ["train2014/a.jpg"]
    with pytest.raises(UserError, match=r"would both be train"):
        convert_folder(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "images", "found"),
    [
        # CVAT: a subset for each split, in its own folder or in a common one
        ({"instances_Train": "a.png", "instances_Validation": "b.png"}, "images/{}", ["Train", "Validation"]),
        ({"instances_Train": "a.png", "instances_Validation": "b.png"}, "images", ["Train", "Validation"]),
        ({"train": "a.png", "valid": "b.png"}, "images", ["train", "valid"]),
        ({"train": "sub/a.png", "val": "sub/b.png"}, ".", ["train", "val"]),
        # file names relative to the root, and with the backslashes of Windows
        ({"train": "images/a.png", "val": "images\\b.png"}, ".", ["train", "val"]),
    ],
)
def test_annotation_files_in_one_folder(tmp_path, files, images, found):
    for name, file_name in files.items():
        folder = tmp_path / images.format(name.removeprefix("instances_"))
        write_coco(tmp_path / "annotations" / f"{name}.json", file_name, images=folder)
    splits = find_splits(tmp_path)
    assert [split.name for split in splits] == found
    for split, name in zip(splits, ("train", "valid"), strict=True):
        assert find_split(tmp_path, name) == split
        assert len(split.read()) == 1  # which stops at an image that is not there


@pytest.mark.parametrize(
    ("file", "names", "images"),
    [
        ("annotations/instances_default.json", ("a.png",), "images"),
        ("annotations/instances_default.json", ("a.png",), "images/default"),
        ("annotations/instances_default.json", ("cam1/a.png", "cam2/a.png"), "."),
        ("result.json", ("images/a.png", "images\\b.png"), "."),
        ("result.json", ("a.png",), "images"),
        ("labels.json", ("a.png",), "data"),
        (OURS, ("a.png",), "images"),
    ],
)
def test_a_set_without_splits(tmp_path, file, names, images):
    root = tmp_path / "set"
    write_coco(root / file, *names, images=root / images)
    (root / "notes.json").write_text('{"images": [], "about": "annotations"}')  # no COCO file
    assert [split.name for split in find_splits(root)] == [WHOLE]
    assert len(find_split_or_whole(root).read()) == len(names)
    assert len(split_of_file(root / file).read()) == len(names)
    with pytest.raises(UserError, match=r"no train split.*without splits.*sam3lora data split"):
        required_split(root, "train")
    # all commands that read data sets take it
    assert [split.num_images for split in check_folder(root).splits] == [len(names)]
    report = convert_folder(root, tmp_path / "converted")
    assert report.splits["."]["num_objects"] == len(names)
    if len(names) > 1:
        split_folder(root, tmp_path / "splits", fractions=(0.5, 0.5))
        assert [split.name for split in find_splits(tmp_path / "splits")] == ["train", "valid"]


def test_the_only_coco_file_in_a_split_folder_is_taken(tmp_path):
    write_coco(tmp_path / "train" / "labels.json", "a.png", images=tmp_path / "train" / "data")
    write_coco(tmp_path / "val" / "annotations" / "instances.json", "a.png", images=tmp_path / "val" / "images")
    assert paths_of(tmp_path, "train") == ["train/data/a.png"]
    assert paths_of(tmp_path, "valid") == ["val/images/a.png"]
    # of two it is not known which; ours is always the one
    write_coco(tmp_path / "train" / "old.json", "a.png")
    with pytest.raises(UserError, match=r"labels\.json.*old\.json.*data\.annotation_file"):
        find_split(tmp_path, "train")
    assert find_split(tmp_path, "train", "old.json").annotation_file == tmp_path / "train" / "old.json"
    write_coco(tmp_path / "train" / OURS, "a.png")
    assert find_split(tmp_path, "train").annotation_file == tmp_path / "train" / OURS


def test_what_is_said_of_a_split_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        required_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match=r"no _annotations\.coco\.json.*found nothing"):
        required_split(tmp_path, "train")
    write_coco(tmp_path / "night" / OURS, "a.png")
    with pytest.raises(UserError, match=r"no train split.*found night.*data\.train_split"):
        required_split(tmp_path, "train")
    assert {"valid/", "val/", "validation/"} <= set(missing_split(tmp_path, "valid").replace(",", " ").split())
    # a folder of the split without labels is a mistake, not a data set without the split
    for folder in ("val", "day"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.json").write_text("{}")
    with pytest.raises(UserError, match=r"val/_annotations\.coco\.json.*notes\.json"):
        find_split(tmp_path, "valid")
    with pytest.raises(UserError, match=r"day/_annotations\.coco\.json"):
        find_split(tmp_path, "day")


def test_a_folder_of_labelme_files_is_no_coco_set(tmp_path):
    for number in range(3):
        write_image(tmp_path / "train" / f"{number}.png")
        (tmp_path / "train" / f"{number}.json").write_text('{"shapes": [], "imagePath": "0.png"}')
    assert find_splits(tmp_path) == []


def test_images_are_found_when_annotations_come_first_in_a_long_file(tmp_path):
    # the file names lie behind more than one part of the file as it is read, one across the border of two parts
    path = write_coco(tmp_path / "annotations" / "train.json", "a.png", images=tmp_path / "images")
    content = json.loads(path.read_text())
    for padding in (2**20 - 40, 2**20 - 20, 3 * 2**20):
        path.write_text(json.dumps({"info": "x" * padding, "images": content.pop("images"), **content}))
        content = json.loads(path.read_text())
        content.pop("info")
        assert paths_of(tmp_path, "train") == ["images/a.png"]


def test_a_link_in_a_circle_hides_no_other_file(tmp_path):
    write_coco(tmp_path / "valid" / OURS, "a.png", "b.png")
    for link in (tmp_path / "old", tmp_path / "valid" / "z.png"):
        link.symlink_to(link.name)
    assert paths_of(tmp_path, "valid") == ["valid/a.png", "valid/b.png"]
    assert [split.name for split in find_splits(tmp_path)] == ["valid"]
