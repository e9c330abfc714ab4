"""Layouts of data sets of masks: which folders are images, masks and splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.mask_folders import find_mask_folders
from sam3lora.data.split_files import required_split
from sam3lora.errors import UserError

from .convert_cases import write_image


def fill(root: Path, *folders: str) -> Path:
    for folder in folders:
        write_image(root / folder / "a.png", (8, 6))
    return root


def found(root: Path) -> dict[str, tuple[str, str]]:
    pairs = find_mask_folders(root)
    return {split: tuple(path.relative_to(root).as_posix() for path in pair) for split, pair in pairs.items()}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("images", "masks"), {".": ("images", "masks")}),
        (("image", "mask"), {".": ("image", "mask")}),
        (("Imgs", "GT"), {".": ("Imgs", "GT")}),
        (
            ("images/train", "images/val", "masks/train", "masks/val"),
            {"train": ("images/train", "masks/train"), "valid": ("images/val", "masks/val")},
        ),
        (
            ("train/image", "train/mask", "test/image", "test/mask"),
            {"train": ("train/image", "train/mask"), "test": ("test/image", "test/mask")},
        ),
        (("DUTS-TR-Image", "DUTS-TR-Mask"), {"train": ("DUTS-TR-Image", "DUTS-TR-Mask")}),
        (
            ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
            {
                "train": ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
                "test": ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
            },
        ),
        (
            ("train_images", "train_masks", "val_images", "val_masks"),
            {"train": ("train_images", "train_masks"), "valid": ("val_images", "val_masks")},
        ),
        # a folder of the usual name goes before others, and an empty one is none
        (("images", "masks", "gt"), {".": ("images", "masks")}),
        # a split without masks is there, so that it can be counted; a lone folder beside others is not
        (
            ("train/images", "train/masks", "valid/images"),
            {"train": ("train/images", "train/masks"), "valid": ("valid/images", "valid/masks")},
        ),
        (("images", "img"), {}),
        (("images", "night_masks"), {}),
    ],
)
def test_folders_of_images_and_masks(tmp_path, folders, expected):
    assert found(fill(tmp_path, *folders)) == expected


def test_folders_without_images_are_no_masks(tmp_path):
    # as of YOLO and of trackers, whose gt/ holds text files
    root = fill(tmp_path, "images", "train/images")
    for folder in ("gt", "train/gt"):
        (root / folder).mkdir()
        (root / folder / "a.txt").write_text("0 0.5 0.5 1 1")
    assert found(root) == {"train": ("train/images", "train/masks")}


@pytest.mark.parametrize(
    "folders", [("images", "mask", "gt"), ("train/images", "train/masks", "train_images", "train_masks")]
)
def test_folders_that_could_be_the_same_are_refused(tmp_path, folders):
    with pytest.raises(UserError):
        find_mask_folders(fill(tmp_path, *folders))


def test_a_set_without_splits_becomes_one_coco_folder(tmp_path):
    source = tmp_path / "in"
    for stem, value in (("a", 255), ("b", 0)):
        write_image(source / "mirror-image" / f"{stem}.jpg", (8, 6))
        (source / "mirror-mask").mkdir(exist_ok=True)
        Image.new("L", (8, 6), value).save(source / "mirror-mask" / f"{stem}_mask.png")
    report = convert_folder(source, tmp_path / "out", names=["mirror"])
    assert report.splits == {".": {"num_images": 2, "num_negatives": 1, "num_objects": 1, "categories": {"mirror": 1}}}


def test_a_data_set_of_masks_given_as_coco_is_told_how_to_convert(tmp_path):
    fill(tmp_path, "train/images", "train/masks")
    with pytest.raises(UserError, match=rf"data convert {tmp_path} .*--from masks"):
        required_split(tmp_path, "train")
    with pytest.raises(UserError) as raised:
        required_split(fill(tmp_path / "other", "pictures"), "train")
    assert "--from masks" not in str(raised.value)
