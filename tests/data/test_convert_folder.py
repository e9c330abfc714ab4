"""Converting as a whole: formats told from files, whole folders or none, images untouched, COCO as written."""

from __future__ import annotations

import doctest
import json
import os

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_fill_holes

from sam3lora.data import outlines
from sam3lora.data.coco import CocoIndex
from sam3lora.data.convert import convert_folder, layout
from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.read_coco import read_coco
from sam3lora.data.masks import decode_mask
from sam3lora.errors import UserError

from .coco_builder import annotation, square


def test_examples_in_docstrings():
    for module in (layout, outlines):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


def test_nothing_to_convert(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        convert_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no labels found"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    # Named, but not there.
    with pytest.raises(UserError, match="found 0 images and no labelled object as voc"):
        convert_folder(tmp_path / "in", tmp_path / "out", source_format="voc")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("options", [{"source_format": "xml"}, {"target_format": "voc"}])
def test_unknown_format(folder, tmp_path, options):
    folder.write([annotation(1)])
    with pytest.raises(UserError, match="unknown format"):
        convert_folder(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"instances": True},  # no mask image on either side
        {"components": True},
        {"source_format": "masks", "target_format": "masks", "instances": True},  # on which side?
        {"source_format": "masks", "instances": True, "components": True},
    ],
)
def test_options_that_could_not_act(folder, tmp_path, options):
    folder.write([annotation(1)])
    with pytest.raises(UserError, match=r"--instances|--components"):
        convert_folder(tmp_path, tmp_path / "out", **options)


def test_ambiguous_format(folder, tmp_path):
    path = folder.write([annotation(1)])
    (path / "images").mkdir()
    (path / "masks").mkdir()
    with pytest.raises(UserError, match="as coco and as masks: choose one with --from"):
        convert_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("name", "content"), [("a.xml", "<annotation/>"), ("a.json", '{"shapes": []}')])
def test_format_is_told_from_the_files(tmp_path, name, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    with pytest.raises(UserError, match="labelled object as " + {"a.xml": "voc", "a.json": "labelme"}[name]):
        convert_folder(tmp_path / "in", tmp_path / "out")


def test_target_that_holds_something_stays(folder, tmp_path):
    folder.write([annotation(1)])
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("")
    with pytest.raises(UserError, match="not empty"):
        convert_folder(tmp_path / "train", target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_failure_leaves_nothing(folder, tmp_path, monkeypatch):
    folder.write([annotation(1)])
    target = tmp_path / "out"
    target.mkdir()

    def fail(*_):
        raise OSError("disk full")

    # By then images and labels are written.
    monkeypatch.setattr("sam3lora.data.convert.write_yolo._write_description", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_folder(tmp_path / "train", target, target_format="yolo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train"]
    assert not any(target.iterdir())


def test_images_are_linked_and_not_encoded_again(folder, tmp_path):
    path = folder.write([annotation(1)])
    convert_folder(path, tmp_path / "out", target_format="yolo")
    assert os.path.samefile(path / "0.png", tmp_path / "out" / "images" / "0.png")


def test_images_are_copied_across_file_systems(folder, tmp_path, monkeypatch):
    path = folder.write([annotation(1)])

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    convert_folder(path, tmp_path / "out")
    assert (tmp_path / "out" / "0.png").read_bytes() == (path / "0.png").read_bytes()


def test_equal_names_in_one_split_are_told_apart(folder, tmp_path):
    # Label files are named after the image's stem.
    images = [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(("a.png", "a.jpg"))]
    path = folder.write([annotation(1, 0), annotation(2, 1), annotation(3, 1)], images=images)
    report = convert_folder(path, tmp_path / "out", target_format="yolo")
    assert {p.name for p in (tmp_path / "out" / "images").iterdir()} == {"a.png", "a_2.jpg"}
    assert len((tmp_path / "out" / "labels" / "a_2.txt").read_text().splitlines()) == 2
    assert [fault.count for fault in report.faults if fault.action == "renamed"] == [1]


def test_coco_as_written_is_clean(folder, tmp_path, tmp_path_factory):
    # Roboflow's parent row and double names go, ids begin at 1, areas are those of masks, crowds and negatives stay.
    categories = (("road", 0), ("crack", 1), ("Crack", 2), ("rare", 5))
    path = folder.write(
        [annotation(7, 0, 1), annotation(8, 0, 2, segmentation=[square(10, 10, 20), square(40, 10, 5)], iscrowd=1)],
        num_images=2,
        categories=categories,
    )
    content = json.loads((path / "_annotations.coco.json").read_text())
    content["categories"][1]["supercategory"] = "road"
    (path / "_annotations.coco.json").write_text(json.dumps(content))
    out = tmp_path_factory.mktemp("converted") / "out"
    report = convert_folder(tmp_path, out)
    written = json.loads((out / "train" / "_annotations.coco.json").read_text())
    assert written["categories"] == [{"id": 1, "name": "crack"}, {"id": 2, "name": "rare"}]
    assert [a["id"] for a in written["annotations"]] == [1, 2]
    assert [a["area"] for a in written["annotations"]] == [400, 425]
    assert [a["iscrowd"] for a in written["annotations"]] == [0, 1]
    assert report.splits["train"]["num_negatives"] == 1
    assert len(CocoIndex.from_folder(out / "train")) == 2
    with pytest.raises(UserError, match="lies within"):
        convert_folder(tmp_path, tmp_path / "out")


def test_crowds_are_left_out_where_they_cannot_be_told(folder, tmp_path):
    path = folder.write([annotation(1), annotation(2, iscrowd=1)])
    report = convert_folder(path, tmp_path / "out", target_format="yolo")
    assert report.splits["."]["num_objects"] == 1
    assert [fault.count for fault in report.faults] == [1]


def test_two_folders_for_one_split(folder, tmp_path):
    folder.path = tmp_path / "val"
    folder.write([annotation(1)])
    folder.path = tmp_path / "valid"
    folder.write([annotation(1)])
    with pytest.raises(UserError, match="would both be valid"):
        convert_folder(tmp_path, tmp_path / "out")


def test_outline_of_nothing():
    assert outlines.trace_outlines(np.zeros((4, 5), dtype=bool)) == ([], 0)


def test_joined_outlines_draw_the_mask_with_its_holes_filled():
    rng = np.random.default_rng(0)
    masks = rng.random((200, 9, 11)) < rng.uniform(0.1, 0.9, (200, 1, 1))
    masks[0] = False
    masks[0, 1:8, 1:8] = True
    masks[0, 2:7, 2:7] = False
    masks[0, 4, 4] = True  # an island in the hole, which must not become a hole itself
    num_holes = 0
    for mask in masks:
        parts, holes = outlines.trace_outlines(mask)
        ring = outlines.join_outlines(parts)
        filled = binary_fill_holes(mask)
        np.testing.assert_array_equal(decode_mask([ring.ravel().astype(float).tolist()], mask.shape), filled)
        assert (holes > 0) == bool((filled & ~mask).any())
        num_holes += holes
    assert num_holes > 100
    assert outlines.trace_outlines(masks[0])[1] == 1


@pytest.mark.parametrize("name", ["strawberry", "coco_tiny_permissive"])
def test_real_sets_survive_the_way_to_yolo_and_back(shared_data, tmp_path, name):
    log = FaultLog()
    before = read_coco(shared_data / name, None, log)
    convert_folder(shared_data / name, tmp_path / "yolo", target_format="yolo")
    convert_folder(tmp_path / "yolo", tmp_path / "coco")
    after = read_coco(tmp_path / "coco", None, log)
    before.drop_crowds(log)
    assert after.categories == before.categories
    assert after.summary() == before.summary()
    old = {(split, image.path.name): image for split, images in before.splits.items() for image in images}
    ious = []
    for split, images in after.splits.items():
        for image in images:
            source = old[split, image.path.name]
            assert image.size_hw == source.size_hw
            assert [t.category for t in image.objects] == [t.category for t in source.objects]
            for a, b in zip(source.objects, image.objects, strict=True):
                one, two = a.decode(image.size_hw), b.decode(image.size_hw)
                ious.append((one & two).sum() / max((one | two).sum(), 1))
    # What is lost are nine filled holes, and objects smaller than a pixel's centre.
    assert np.mean(ious) > 0.999
    assert np.quantile(ious, 0.01) > 0.99


def test_source_with_an_unreadable_image(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "labels").mkdir()
    for stem in "ab":
        Image.new("RGB", (8, 6)).save(tmp_path / "in" / "images" / f"{stem}.png")
        (tmp_path / "in" / "labels" / f"{stem}.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "in" / "images" / "b.png").write_bytes(b"")
    report = convert_folder(tmp_path / "in", tmp_path / "out", names=["crack"])
    assert report.splits["."]["num_images"] == 1
    assert "image that cannot be read" in [fault.description for fault in report.faults]
    assert json.loads(json.dumps(report.to_dict()))["target_format"] == "coco"
