"""One case per fault of an annotation file: what is kept, what is counted."""

from __future__ import annotations

import json

import pytest
from pycocotools import mask as coco_mask

from sam3lora.data.coco import CocoIndex, merge_names
from sam3lora.data.images import ImageError
from sam3lora.data.masks import mask_area
from sam3lora.errors import UserError

from .coco_builder import annotation, square


def faults(index: CocoIndex) -> dict[str, int]:
    return {fault.kind: fault.count for fault in index.faults}


def objects(index: CocoIndex, row: int = 0) -> list[dict]:
    return index.record(row)["annotations"]


def test_clean_file_has_no_fault(folder):
    # a box that covers a half of its mask agrees with it, and a pixel outside comes from rounding
    edges = [annotation(x + 9, bbox=[x, y, 20, 20], segmentation=[square(x, y, 20)]) for x, y in ((-1, -1), (61, 41))]
    index = CocoIndex.from_folder(folder.write([annotation(0), annotation(1, bbox=[10, 10, 20, 10]), *edges]))
    assert faults(index) == {}
    assert (len(index), index.names, index.record(0)["image_id"], objects(index)[0]["id"]) == (1, ("crack",), 0, 0)


@pytest.mark.parametrize(
    ("changes", "kind", "kept"),
    [
        # a part of two points is dropped, the object stays with its box
        ({"segmentation": [[1, 1, 5, 5]]}, "short_polygon", 1),
        # an odd number of values cannot be points
        ({"segmentation": [[1, 1, 5, 5, 9, 9, 3]]}, "bad_polygon", 1),
        # runs that do not fill the mask
        ({"segmentation": {"size": [60, 80], "counts": [5, 5]}}, "bad_rle", 1),
        # a compressed string that is cut off, which pycocotools reads without complaint
        ({"segmentation": {"size": [60, 80], "counts": "abc"}}, "bad_rle", 1),
        # half outside: clipped
        ({"bbox": [-10, 10, 20, 20], "segmentation": [square(-10, 10, 20)]}, "out_of_bounds", 1),
        # nothing inside the image at all
        ({"bbox": [100, 100, 20, 20], "segmentation": [square(100, 100, 20)]}, "empty_object", None),
        # a box only
        ({"segmentation": []}, "box_without_mask", 1),
        # a mask only, and those whose box is no numbers, or has no width or no height, wherever it is
        ({"bbox": None}, "mask_without_box", 1),
        ({"bbox": ["10", 10, 20, 20]}, "mask_without_box", 1),
        ({"bbox": [10, 10, 0, 20]}, "mask_without_box", 1),
        ({"bbox": [90, 10, 5, 0]}, "mask_without_box", 1),
        # neither
        ({"bbox": [10, 10, 0, 0], "segmentation": []}, "empty_object", None),
        # points on a line have no area, and a box without height has none either
        ({"bbox": [1, 1, 8, 0], "segmentation": [[1, 1, 5, 5, 9, 9]]}, "empty_object", None),
        # box in xyxy instead of xywh
        ({"bbox": [10, 10, 60, 50], "segmentation": [square(10, 10, 20)]}, "box_mask_disagree", 1),
        # box and mask of 20 x 20 that are 7 pixels apart overlap by 13 / 27
        ({"bbox": [17, 10, 20, 20]}, "box_mask_disagree", 1),
        ({"iscrowd": 1}, "crowd", 1),
        ({"category_id": 9}, "unknown_category", None),
        ({"image_id": 9}, "unknown_image", 0),
        ({"image_id": None}, "bad_annotation", 0),
        # a mask made on another size than the image has
        ({"segmentation": {"size": [30, 40], "counts": [600, 600]}}, "rle_size_mismatch", 1),
    ],
)
def test_annotation_fault_is_counted_with_an_example_and_an_action(folder, changes, kind, kept):
    index = CocoIndex.from_folder(folder.write([annotation(5, **changes), annotation(6, image_id=1)], num_images=2))
    assert faults(index)[kind] == 1
    assert kind == "out_of_bounds" or "out_of_bounds" not in faults(index)
    fault = next(fault for fault in index.faults if fault.kind == kind)
    assert "5" in fault.examples[0] or kind == "bad_annotation"
    assert fault.action in str(fault)
    left_out = index.record(0)["image_id"] == 1
    # an image of whose label it is not known what it marks is left out: it must not become a negative
    assert left_out == (kept is None) == (faults(index).get("unclear_image", 0) == 1)
    assert left_out or len(objects(index)) == kept


def test_boxes_are_clipped_and_taken_from_masks(folder):
    path = folder.write(
        [
            annotation(0, bbox=[-10, 10, 20, 20], segmentation=[]),
            annotation(1, bbox=None, segmentation=[square(70, 40, 20)]),
        ]
    )
    assert [o["bbox_xywh"] for o in objects(CocoIndex.from_folder(path))] == [[0, 10, 10, 20], [70, 40, 10, 20]]


def test_all_forms_of_a_mask_have_the_same_area(folder):
    rle = coco_mask.merge(coco_mask.frPyObjects([square(10, 10, 20)], 60, 80))
    text = {"size": [60, 80], "counts": rle["counts"].decode()}
    column = [610] + [20, 40] * 19 + [20]
    column.append(60 * 80 - sum(column))
    spellings = [[square(10, 10, 20)], square(10, 10, 20), text, {"size": [60, 80], "counts": column}]
    spellings.append([square(10, 10, 10), square(20, 10, 10), square(10, 20, 10), square(20, 20, 10)])
    path = folder.write([annotation(i, segmentation=s) for i, s in enumerate(spellings)])
    index = CocoIndex.from_folder(path)
    # the file says area 1 everywhere
    assert [mask_area(o["segmentation"], (60, 80)) for o in objects(index)] == [400] * 5


def test_duplicate_names_are_one_category_and_unused_rows_are_none(folder):
    path = folder.write(
        [annotation(0, category_id=1), annotation(1, category_id=3)],
        categories=(("crack", 0), ("Crack ", 1), ("root", 2), ("crack", 3)),
    )
    index = CocoIndex.from_folder(path)
    assert index.names == ("crack",)
    assert index.category_names == {1: "crack", 3: "crack"}
    assert faults(index) == {"unused_category": 2, "duplicate_category_name": 1}


def test_duplicate_ids(folder):
    first = annotation(0)
    moved = annotation(0, bbox=[40, 10, 20, 20], segmentation=[square(40, 10, 20)])
    index = CocoIndex.from_folder(folder.write([first, first, moved, annotation(7)]))
    # the exact copy is dropped, the other object gets an unused id
    assert [o["id"] for o in objects(index)] == [0, 8, 7]
    assert faults(index) == {"duplicate_annotation": 1, "duplicate_annotation_id": 1}


def test_image_entries(folder):
    entry = {"id": 0, "file_name": "0.png", "width": 80, "height": 60}
    images = [entry, {**entry}, {**entry, "id": 1}, {"id": 2, "file_name": "1.png"}]
    moved = annotation(1, image_id=1, bbox=[40, 10, 20, 20], segmentation=[square(40, 10, 20)])
    path = folder.write([annotation(0), moved, annotation(2, image_id=1)], images=images, num_images=2)
    content = json.loads((path / "_annotations.coco.json").read_text())
    content["images"].append({"file_name": "no id"})
    (path / "_annotations.coco.json").write_text(json.dumps(content))
    index = CocoIndex.from_folder(path)
    # the labels of both listings of a file belong to one image, what both have counts once
    assert [[o["id"] for o in objects(index, row)] for row in range(len(index))] == [[0, 1], []]
    assert faults(index) == {
        "duplicate_image_id": 1,
        "duplicate_file_name": 1,
        "duplicate_annotation": 1,
        "no_size": 1,
        "bad_image_entry": 1,
    }
    # the size that the file lacks comes from the image
    assert (index.record(1)["height"], index.record(1)["width"]) == (60, 80)
    assert index.image_ids.find(1) == index.image_ids.find("0") == 0


def test_missing_image_stops_or_is_left_out_with_its_annotations(folder):
    path = folder.write([annotation(0), annotation(1, image_id=1)], num_images=2)
    (path / "1.png").unlink()
    with pytest.raises(ImageError, match=r"1 listed .*1\.png"):
        CocoIndex.from_folder(path)
    index = CocoIndex.from_folder(path, on_bad_image="skip")
    assert (len(index), faults(index)) == (1, {"missing_image": 1, "left_out_label": 1})
    (path / "0.png").unlink()
    with pytest.raises(UserError, match=r"none of its 2 images.*2 x"):
        CocoIndex.from_folder(path, on_bad_image="skip")


def test_unusable_files_say_what_was_expected(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        CocoIndex.from_folder(tmp_path / "nowhere")
    path = folder.write([annotation(0)])
    with pytest.raises(UserError, match=r"other\.json.*_annotations\.coco\.json"):
        CocoIndex.from_folder(path, "other.json")
    text = (path / "_annotations.coco.json").read_text()
    (path / "_annotations.coco.json").write_text(text[:-40])
    with pytest.raises(UserError, match="truncated"):
        CocoIndex.from_folder(path)
    (path / "_annotations.coco.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="annotations, categories"):
        CocoIndex.from_folder(path)


def test_images_in_a_subfolder(folder):
    path = folder.write([annotation(0)])
    (path / "images").mkdir()
    (path / "0.png").rename(path / "images" / "0.png")
    assert CocoIndex.from_folder(path).record(0)["path"].endswith("images/0.png")


def test_select_categories_keeps_images_and_names_the_nearest(folder):
    path = folder.write(
        [annotation(0), annotation(1, image_id=1, category_id=2)], num_images=2, categories=(("crack", 1), ("root", 2))
    )
    index = CocoIndex.from_folder(path)
    only = index.select_categories(["Root"])
    assert (len(only), only.names, [len(objects(only, i)) for i in (0, 1)]) == (2, ("root",), [0, 1])
    with pytest.raises(UserError, match=r"'crak'.*'crack'"):
        index.select_categories(["crak"])
    assert merge_names([only, index]) == ("root", "crack")
    assert index.select_rows([1]).record(0)["image_id"] == 1
