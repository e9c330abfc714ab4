"""The generated data set is a clean COCO folder whose masks are exactly those that were drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.images import read_image
from sam3lora.data.masks import decode_mask, mask_area
from sam3lora.data.synth.dataset import encode_mask, scene_of, write_dataset
from sam3lora.data.synth.scenes import draw_empty
from sam3lora.errors import UserError

SIZE = 96


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "data"
    return write_dataset(folder, num_train=40, num_valid=12, size=SIZE, seed=3, progress=False)


def _content(folder: Path, split: str) -> dict:
    return json.loads((folder / split / ANNOTATION_FILE).read_text())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- segmentations --------------------------------------------------------------------------------------------------


def test_one_part_becomes_a_polygon_on_pixel_edges():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:4] = True
    # the corners enclose whole pixels: 3 wide and 2 high; tracing pixel centres would give 2 and 1
    (polygon,) = encode_mask(mask)
    assert sorted(zip(polygon[::2], polygon[1::2])) == [(1, 1), (1, 3), (4, 1), (4, 3)]


def test_holes_and_several_parts_become_rle():
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    two = np.zeros((5, 9), bool)
    two[1:3, 1:3] = two[1:3, 6:8] = True
    # one outline cannot describe either of them
    for mask in (ring, two):
        segmentation = encode_mask(mask)
        assert isinstance(segmentation["counts"], str)
        np.testing.assert_array_equal(decode_mask(segmentation, mask.shape), mask)


def test_any_blob_decodes_to_itself():
    rng = np.random.default_rng(0)
    # ragged blobs with single-pixel bridges, diagonal contacts and pixels on the border
    for _ in range(60):
        mask = rng.random((12, 14)) < rng.uniform(0.05, 0.95)
        mask[6, 7] = True
        np.testing.assert_array_equal(decode_mask(encode_mask(mask), mask.shape), mask)


# ---- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "split"), [(0, "train"), (1, "valid")])
def test_folder_has_no_faults_and_the_masks_that_were_drawn(dataset: Path, stream: int, split: str):
    index = CocoIndex.from_folder(dataset / split)
    assert index.names == ("gear", "arrow", "bolt", "capsule")
    assert not list(index.faults)
    kinds = set()
    for row in range(len(index)):
        record = index.record(row)
        scene = scene_of(stream, row, seed=3, size=SIZE, domain="shift")
        seen = [thing for thing in scene.objects if thing.mask_HW.any()]
        assert [a["category"] for a in record["annotations"]] == [thing.noun for thing in seen]
        for annotation, thing in zip(record["annotations"], seen, strict=True):
            kinds.add(type(json.loads(annotation["segmentation"])))
            np.testing.assert_array_equal(decode_mask(annotation["segmentation"], (SIZE, SIZE)), thing.mask_HW)
            assert tuple(annotation["bbox_xywh"]) == thing.box_xywh
        # JPEG changes pixels a little; another image would differ much more
        image = read_image(record["path"]).astype(float)
        assert np.abs(image - scene.image_HW3).mean() < 6
    assert kinds == {list, dict}  # polygons and RLE both occur: gears have holes


def test_areas_are_those_of_the_masks_and_some_images_are_empty(dataset: Path):
    content = _content(dataset, "train")
    for annotation in content["annotations"]:
        assert annotation["area"] == mask_area(annotation["segmentation"], (SIZE, SIZE)) > 0
    empty = len(content["images"]) - len({a["image_id"] for a in content["annotations"]})
    assert 1 <= empty <= 8  # 8 % of 40
    scene = draw_empty(np.random.default_rng(0), size=SIZE, domain="shift")
    assert (scene.objects, scene.image_HW3.shape, scene.image_HW3.dtype) == ([], (SIZE, SIZE, 3), np.uint8)


def test_a_larger_set_begins_with_the_images_of_a_smaller_one(dataset: Path, tmp_path: Path):
    # two more training images and a test split: everything else is equal to the byte
    more = write_dataset(tmp_path / "more", num_train=42, num_valid=12, num_test=3, size=SIZE, seed=3, progress=False)
    first, second = _bytes(dataset), _bytes(more)
    del first[f"train/{ANNOTATION_FILE}"]
    assert all(second[name] == content for name, content in first.items())
    assert len(CocoIndex.from_folder(more / "test")) == 3
    # no two streams draw the same first image
    other = write_dataset(tmp_path / "other", num_train=1, num_valid=1, size=SIZE, seed=4, progress=False)
    drawn = [second[f"{split}/00000.jpg"] for split in ("train", "valid", "test")]
    drawn += [_bytes(other)[f"{split}/00000.jpg"] for split in ("train", "valid")]
    assert len(set(drawn)) == 5


def test_base_domain_lists_the_nouns_that_occur_in_either_split(tmp_path: Path):
    folder = write_dataset(tmp_path / "d", num_train=2, num_valid=2, size=64, domain="base", progress=False)
    train, valid = _content(folder, "train"), _content(folder, "valid")
    assert train["categories"] == valid["categories"]
    used = {a["category_id"] for a in train["annotations"] + valid["annotations"]}
    assert used == {category["id"] for category in train["categories"]}


@pytest.mark.parametrize("change", [{"domain": "moon"}, {"num_train": 0}, {"size": 8}, {"seed": -1}])
def test_arguments_out_of_range_and_folders_that_are_not_empty_are_refused(tmp_path: Path, change: dict):
    with pytest.raises(UserError, match=next(iter(change))):
        write_dataset(tmp_path / "d", **{"num_train": 1, "num_valid": 1, "progress": False} | change)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_dataset(tmp_path, num_train=1, num_valid=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
