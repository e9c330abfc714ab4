"""Void pixels: from mask images to COCO files and back, in label maps, and in the prompts of detection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.convert import convert_folder
from sam3lora.data.label_maps import LabelMaps
from sam3lora.data.prompts import build_queries, sample_rng
from sam3lora.data.split.splitting import split_folder
from sam3lora.evaluation.metrics.ground_truth import annotations_of_record, prompted_categories

from .coco_builder import annotation, square
from .convert_cases import write_image

NUMBERED = {"both": "0012xx", "border": "xx1100", "void": "00xx00", "negative": "000000", "hole": "220000"}
ONE = {"both": "0011xx", "void": "00xx00", "negative": "000000", "crack": "110000"}


def write(root: Path, masks: dict[str, str]) -> Path:
    """A split whose masks have two equal rows of the digits; x is 255 and w is white, too."""
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
    for number, (stem, row) in enumerate(masks.items()):
        pixels = np.random.default_rng(number).integers(0, 255, (2, len(row), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / "images" / f"{stem}.jpg")
        values = [255 if letter in "xw" else int(letter) for letter in row]
        Image.fromarray(np.array([values] * 2, dtype=np.uint8)).save(root / "train" / "masks" / f"{stem}.png")
    return root


def rows(folder: Path) -> dict[str, str]:
    """The inverse of `write`."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        first, second = np.array(Image.open(path)).tolist()
        assert first == second
        found[path.stem] = "".join("x" if value == 255 else str(value) for value in first)
    return found


def faults(report) -> dict[str, int]:
    return {fault.kind: fault.count for fault in report.faults}


def records(root: Path) -> dict[str, dict]:
    index = CocoIndex.from_folder(root / "train")
    return {Path(one["path"]).stem: one for one in map(index.record, range(len(index)))}


@pytest.mark.parametrize(("names", "masks"), [(["crack", "hole"], NUMBERED), (["crack"], ONE)])
def test_masks_come_back_equal_with_their_void(tmp_path, names, masks):
    there = convert_folder(write(tmp_path / "in", masks), tmp_path / "coco", names=names)
    back = convert_folder(tmp_path / "coco", tmp_path / "out", target_format="masks")
    assert (faults(there), faults(back)) == ({}, {})
    assert rows(tmp_path / "out" / "train" / "masks") == masks
    # the names that were written are enough to read the masks again
    convert_folder(tmp_path / "out", tmp_path / "again")
    convert_folder(tmp_path / "again", tmp_path / "out2", target_format="masks")
    assert rows(tmp_path / "out2" / "train" / "masks") == masks


def test_an_image_of_void_alone_comes_back_where_no_mask_has_both(tmp_path):
    # 255 never lies beside 1: the file of names says that the values are numbers
    masks = {"void": "00xx00", "crack": "110000"}
    convert_folder(write(tmp_path / "in", masks), tmp_path / "coco", names=["background", "crack"])
    convert_folder(tmp_path / "coco", tmp_path / "out", target_format="masks")
    convert_folder(tmp_path / "out", tmp_path / "again")
    convert_folder(tmp_path / "again", tmp_path / "out2", target_format="masks")
    assert rows(tmp_path / "out2" / "train" / "masks") == masks


@pytest.mark.parametrize(
    ("masks", "names", "expected", "counted"),
    [
        # 255 beside 1 in one mask is void in all of them, whichever is read first
        ({"a": "00ww", "b": "01x0", "c": "w000"}, ["crack"], {"a": "00xx", "b": "01x0", "c": "x000"}, {}),
        # without such a mask both are the category, and that is said
        ({"a": "00ww", "b": "0110"}, ["crack"], {"a": "0011", "b": "0110"}, {"mixed_white": 1}),
        ({"a": "00ww", "b": "0110"}, ["background", "crack"], {"a": "00xx", "b": "0110"}, {}),
        # black and white alone is never void
        ({"a": "00ww", "b": "w000"}, ["background", "crack"], {"a": "0011", "b": "1000"}, {}),
    ],
)
def test_white_beside_ones_is_void(tmp_path, masks, names, expected, counted):
    report = convert_folder(write(tmp_path / "in", masks), tmp_path / "coco", names=names)
    assert faults(report) == counted
    labels = LabelMaps({"crack": 1})
    found = {stem: labels.of_record(record)[0, 0].tolist() for stem, record in records(tmp_path / "coco").items()}
    assert found == {stem: [255 if one == "x" else int(one) for one in row] for stem, row in expected.items()}


def test_in_a_set_of_greys_a_one_is_black(tmp_path):
    root = write(tmp_path / "in", {"a": "00ww", "b": "01w0"})
    write_image(root / "train" / "images" / "grey.jpg", (4, 2))
    Image.fromarray(np.array([[3, 90, 200, 255]] * 2, dtype=np.uint8)).save(root / "train" / "masks" / "grey.png")
    report = convert_folder(root, tmp_path / "coco", names=["crack"])
    assert faults(report) == {"grey_mask": 2}
    found = {s: LabelMaps({"crack": 1}).of_record(one)[0, 0].tolist() for s, one in records(tmp_path / "coco").items()}
    assert found == {"a": [0, 0, 1, 1], "b": [0, 0, 1, 0], "grey": [0, 0, 1, 1]}


@pytest.fixture
def converted(tmp_path) -> Path:
    convert_folder(write(tmp_path / "in", NUMBERED), tmp_path / "coco", names=["crack", "hole"])
    return tmp_path / "coco"


@pytest.mark.parametrize("overlapping", [False, True])
def test_void_is_ignored_in_the_maps_of_all_classes(converted, overlapping):
    labels = LabelMaps({"crack": 1, "hole": 2}, overlapping=overlapping)
    for stem, row in NUMBERED.items():
        for label_map in labels.of_record(records(converted)[stem]):
            assert (label_map[0] == 255).tolist() == [letter == "x" for letter in row]


def test_void_stays_where_categories_are_chosen(converted):
    index = CocoIndex.from_folder(converted / "train").select_categories(["hole"])
    assert index.names == ("hole",)
    by_name = {Path(index.record(row)["path"]).stem: index.record(row) for row in range(len(index))}
    labels = LabelMaps({"hole": 1})
    assert {stem: labels.of_record(one)[0, 0].tolist() for stem, one in by_name.items()} == {
        stem: [{"x": 255, "2": 1}.get(letter, 0) for letter in row] for stem, row in NUMBERED.items()
    }


def test_detection_asks_for_no_void_and_takes_it_as_background(converted):
    index = CocoIndex.from_folder(converted / "train")
    assert index.names == ("crack", "hole")

    def asked(stem: str) -> dict[str, bool]:
        queries = build_queries(records(converted)[stem], index.names, rng=sample_rng(0, 0, 0))
        assert all(query.is_exhaustive for query in queries)
        return {query.prompt: query.is_positive for query in queries}

    assert asked("both") == {"crack": True, "hole": True}
    assert asked("border") == {"crack": True, "hole": False}
    assert asked("negative") == {"crack": False, "hole": False}
    # of an image that shows nothing but void, nothing is known
    assert asked("void") == {}
    # where none of the chosen categories is left, the image teaches absence, as one without labels does
    border = CocoIndex.from_folder(converted / "train").select_categories(["hole"]).record(0)
    assert [one["category"] for one in border["annotations"]] == ["void"]
    assert len(build_queries(border, ["hole"], rng=sample_rng(0, 0, 0), num_negatives=0)) == 1


def test_a_category_named_void_with_objects_is_a_category(folder):
    whole = annotation(0, category_id=1, segmentation=[square(10, 10, 20)])
    path = folder.write([whole, annotation(1, category_id=2, iscrowd=1)], categories=(("Void", 1), ("crack", 2)))
    assert CocoIndex.from_folder(path).names == ("Void", "crack")


def test_crowds_of_categories_are_void_in_masks_where_no_object_is(folder, tmp_path):
    regions = [annotation(0, segmentation=[square(10, 10, 20)]), annotation(1, segmentation=[square(20, 20, 20)])]
    folder.path = tmp_path / "in" / "train"
    folder.write([regions[0], regions[1] | {"iscrowd": 1, "bbox": [20, 20, 20, 20]}])
    convert_folder(tmp_path / "in", tmp_path / "out", target_format="masks")
    values_HW = np.array(Image.open(tmp_path / "out" / "train" / "masks" / "0.png"))
    assert {value: int((values_HW == value).sum()) for value in (0, 1, 255)} == {0: 80 * 60 - 700, 1: 400, 255: 300}


def test_other_programs_read_void_as_a_crowd(converted):
    coco = COCO(str(converted / "train" / ANNOTATION_FILE))
    [void] = [category for category in coco.cats.values() if category["name"] == "void"]
    regions = coco.loadAnns(coco.getAnnIds(catIds=[void["id"]]))
    assert {coco.imgs[one["image_id"]]["file_name"]: coco.annToMask(one)[0].tolist() for one in regions} == {
        "both.jpg": [0, 0, 0, 0, 1, 1],
        "border.jpg": [1, 1, 0, 0, 0, 0],
    }
    assert all(one["iscrowd"] for one in regions)


def test_a_format_without_void_takes_it_as_background_and_says_so(tmp_path, converted):
    report = convert_folder(converted, tmp_path / "yolo", target_format="yolo-boxes")
    # the image of void alone would pass for one without objects
    assert faults(report)["void_pixels"] == 2
    assert faults(report)["incomplete_image"] == 1
    assert {path.stem for path in (tmp_path / "yolo").rglob("*.jpg")} == NUMBERED.keys() - {"void"}


def test_void_survives_the_making_of_splits(tmp_path, converted):
    split_folder(converted, tmp_path / "split", fractions=(0.5, 0.5))
    convert_folder(tmp_path / "split", tmp_path / "out", target_format="masks")
    found = rows(tmp_path / "out" / "train" / "masks") | rows(tmp_path / "out" / "valid" / "masks")
    assert found == NUMBERED


def test_void_is_nothing_to_be_found(converted):
    index = CocoIndex.from_folder(converted / "train")
    categories = prompted_categories(index)
    assert [category.name for category in categories] == ["crack", "hole"]

    def truth(stem: str) -> list[tuple[int, int]]:
        found = annotations_of_record(records(converted)[stem], categories)
        return [(annotation["category_id"], annotation["iscrowd"]) for annotation in found]

    assert truth("both") == [(1, 0), (2, 0)]
    # whether an image of void alone shows a category is not known, as with a crowd of it
    assert truth("void") == [(1, 1), (2, 1)]
