"""Converting folders: format detection, all-or-nothing output, untouched images, COCO as it is written."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from sam3lora.data import masks as mask_pixels
from sam3lora.data.coco import CocoIndex
from sam3lora.data.convert import convert_folder
from sam3lora.data.convert.coco_folders import read_coco
from sam3lora.data.convert.run import guess_format
from sam3lora.data.faults import FaultLog
from sam3lora.data.masks import decode_mask
from sam3lora.errors import UserError

from .coco_builder import annotation, square
from .convert_cases import write_image


def test_nothing_to_convert(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        convert_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no labels"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    # a format is named, but there are no such files
    with pytest.raises(UserError, match=r"0 images.*voc"):
        convert_folder(tmp_path / "in", tmp_path / "out", source_format="voc")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"source_format": "xml"}, "xml"),
        ({"target_format": "voc"}, "voc"),
        ({"instances": True}, "--instances"),  # no mask image on either side
        ({"source_format": "masks", "target_format": "masks", "instances": True}, "--instances"),  # on which side?
        ({"components": True}, "--components"),
        ({"source_format": "masks", "instances": True, "components": True}, "--components"),
    ],
)
def test_invalid_options(folder, tmp_path, options, option):
    folder.write([annotation(1)])
    with pytest.raises(UserError, match=option):
        convert_folder(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("path", "content", "kind"),
    [
        ("a.xml", "<annotation/>", "voc"),
        ("valid/a.xml", "<annotation/>", "voc"),
        ("Annotations/a.xml", "<annotation/>", "voc"),
        ("train/a.json", '{"shapes": []}', "labelme"),
        ("train/labels/a.txt", "", "yolo"),
        ("masks/a.png", "", "masks"),
    ],
)
def test_format_is_detected(tmp_path, path, content, kind):
    for name in ("images/a.jpg", "train/images/a.jpg", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert guess_format(tmp_path) == kind


def test_refusals_and_failures_leave_the_target_as_it_was(folder, tmp_path, monkeypatch):
    path = folder.write([annotation(1)])
    mine, target = tmp_path / "mine", tmp_path / "out"
    for name in (mine, target):
        name.mkdir()
    (mine / "notes").write_text("")
    with pytest.raises(UserError, match="mine is not empty"):
        convert_folder(path, mine)
    assert [file.name for file in mine.iterdir()] == ["notes"]

    def fail(*_):
        raise OSError("disk full")

    # images and labels are written by then
    monkeypatch.setattr("sam3lora.data.convert.yolo._write_description", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_folder(path, target, target_format="yolo")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "out", "train"]
    assert not any(target.iterdir())


def test_images_are_linked_or_copied_across_file_systems(folder, tmp_path, monkeypatch):
    path = folder.write([annotation(1)])
    convert_folder(path, tmp_path / "linked", target_format="yolo")
    assert os.path.samefile(path / "0.png", tmp_path / "linked" / "images" / "0.png")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    convert_folder(path, tmp_path / "copied")
    assert (tmp_path / "copied" / "0.png").read_bytes() == (path / "0.png").read_bytes()


def test_images_with_equal_stems_in_one_split_are_renamed(folder, tmp_path):
    # label files are named after the image's stem
    images = [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(("a.png", "a.jpg"))]
    path = folder.write([annotation(1, 0), annotation(2, 1), annotation(3, 1)], images=images)
    report = convert_folder(path, tmp_path / "out", target_format="yolo")
    assert {p.name for p in (tmp_path / "out" / "images").iterdir()} == {"a.png", "a_2.jpg"}
    assert len((tmp_path / "out" / "labels" / "a_2.txt").read_text().splitlines()) == 2
    assert {fault.kind: fault.count for fault in report.faults} == {"renamed_image": 1}


def test_written_coco_folder_is_clean(folder, tmp_path, tmp_path_factory):
    # Roboflow's parent row and double names go, ids begin at 1, areas are those of masks, crowds and negatives stay
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
    # a format without crowd regions leaves them out
    report = convert_folder(tmp_path, out.parent / "yolo", target_format="yolo")
    assert report.splits["train"]["num_objects"] == 1
    assert {fault.kind: fault.count for fault in report.faults}["dropped_crowd"] == 1


def test_ambiguous_sources(folder, tmp_path):
    folder.write([annotation(1)])
    for kind in ("images", "masks"):
        (folder.path / kind).mkdir()
    with pytest.raises(UserError, match=r"coco and as masks.*--from"):
        convert_folder(tmp_path, tmp_path / "out")
    for name in ("val", "valid"):
        folder.path = tmp_path / "splits" / name
        folder.write([annotation(1)])
    with pytest.raises(UserError, match="would both be valid"):
        convert_folder(tmp_path / "splits", tmp_path / "out")


def test_joined_outlines_draw_the_mask_with_its_holes_filled():
    rng = np.random.default_rng(0)
    masks = rng.random((200, 9, 11)) < rng.uniform(0.1, 0.9, (200, 1, 1))
    masks[0] = False
    masks[0, 1:8, 1:8] = True
    masks[0, 2:7, 2:7] = False
    masks[0, 4, 4] = True  # an island in the hole, which must not count as a hole
    num_holes = 0
    for mask in masks:
        parts, holes = mask_pixels.trace_outlines(mask)
        assert all(np.any(part != np.roll(part, 1, axis=0), axis=1).all() for part in parts)  # no corner twice
        ring = mask_pixels.join_outlines(parts)
        filled = binary_fill_holes(mask)
        np.testing.assert_array_equal(decode_mask([ring.ravel().astype(float).tolist()], mask.shape), filled)
        assert (holes > 0) == bool((filled & ~mask).any())
        num_holes += holes
    assert num_holes > 100
    assert mask_pixels.trace_outlines(masks[0])[1] == 1
    assert mask_pixels.trace_outlines(np.zeros((4, 5), dtype=bool)) == ([], 0)


@pytest.mark.parametrize("name", ["strawberry", "coco_tiny_permissive"])
def test_real_sets_survive_conversion_to_yolo_and_back(shared_data, tmp_path, name):
    log = FaultLog()
    source = tmp_path / "in"
    source.mkdir()
    (source / "valid").symlink_to(shared_data / name / "valid")
    before = read_coco(source, None, log)
    convert_folder(source, tmp_path / "yolo", target_format="yolo")
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
    # only holes are lost, and objects that contain no pixel's centre
    assert np.mean(ious) > 0.999
    assert np.quantile(ious, 0.01) > 0.99


def test_source_with_an_unreadable_image(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "labels").mkdir()
    for stem in "ab":
        write_image(tmp_path / "in" / "images" / f"{stem}.png")
        (tmp_path / "in" / "labels" / f"{stem}.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "in" / "images" / "b.png").write_bytes(b"")
    report = convert_folder(tmp_path / "in", tmp_path / "out", names=["crack"])
    assert report.splits["."]["num_images"] == 1
    found = json.loads(json.dumps(report.to_dict()))
    assert found["target_format"] == "coco"
    [fault] = found["faults"]
    assert (fault["kind"], fault["count"], fault["action"]) == ("broken_source_image", 1, "left out")
    assert "b.png" in fault["examples"][0]
