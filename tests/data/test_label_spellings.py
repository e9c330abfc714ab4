"""Files as other programs write them: what has one meaning is read, the rest is counted and left out."""

from __future__ import annotations

import json
import unicodedata

import cv2
import numpy as np
import pytest

from sam3lora.data import index_cache
from sam3lora.data.coco import CocoIndex
from sam3lora.data.ids import IdTable
from sam3lora.data.images import ImageError
from sam3lora.data.masks import decode_mask, mask_area
from sam3lora.data.rle import encode_rle
from sam3lora.errors import UserError

from .coco_builder import annotation, square


def faults(index: CocoIndex) -> dict[str, int]:
    return {fault.kind: fault.count for fault in index.faults}


def objects(index: CocoIndex, row: int = 0) -> list[dict]:
    return index.record(row)["annotations"]


def points(x: float, y: float, side: float) -> list[list[float]]:
    flat = square(x, y, side)
    return [flat[i : i + 2] for i in range(0, 8, 2)]


RUNS = [610, *[20, 40] * 19, 20, 60 * 80 - 610 - 60 * 19 - 20]


@pytest.mark.parametrize(
    "mask",
    [
        [points(10, 10, 20)],
        points(10, 10, 20),
        [[square(10, 10, 20)]],
        [points(10, 10, 10), square(20, 10, 10), [square(10, 20, 10), points(20, 20, 10)]],
        {"size": [60.0, 80.0], "counts": [float(run) for run in RUNS]},
        [{"size": [60, 80], "counts": RUNS}],
    ],
)
def test_nested_spellings_of_a_mask(folder, mask):
    index = CocoIndex.from_folder(folder.write([annotation(0, segmentation=mask)]))
    assert mask_area(objects(index)[0]["segmentation"], (60, 80)) == 400
    assert faults(index) == {}


def test_a_mask_of_several_runs_is_their_union(folder):
    other = [0, 60, 60 * 79]  # the first column
    mask = [{"size": [60, 80], "counts": RUNS}, {"size": [60, 80], "counts": other}]
    index = CocoIndex.from_folder(folder.write([annotation(0, segmentation=mask, bbox=None)]))
    assert mask_area(objects(index)[0]["segmentation"], (60, 80)) == 460
    assert objects(index)[0]["bbox_xywh"] == [0, 0, 30, 60]


@pytest.mark.parametrize(
    "mask",
    [
        ["10", "10", "30", "10", "30", "30"],
        [{"size": [60, 80], "counts": RUNS}, {"size": [30, 40], "counts": [1200]}],
        {"size": [60, 80], "counts": [2.5, 4797.5]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        [[10, 10, 30, 10, 30, float("nan")]],
        [[10, 10, 30, 10, 30, 1e300]],
        [[10, 10, 30, 10, 30, 10**400]],
        "polygon",
    ],
)
def test_a_mask_that_cannot_be_read_leaves_the_box_or_takes_the_image_away(folder, mask):
    with_box = CocoIndex.from_folder(folder.write([annotation(0, segmentation=mask)]))
    assert [o["segmentation"] for o in objects(with_box)] == [None]
    assert faults(with_box)["box_without_mask"] == 1
    labels = [annotation(0, segmentation=mask, bbox=None), annotation(1, image_id=1), annotation(2)]
    without = CocoIndex.from_folder(folder.write(labels, num_images=2))
    assert [without.record(row)["image_id"] for row in range(len(without))] == [1]
    # the readable label of the same image goes with it, and is counted too
    assert (faults(without)["unreadable_label"], faults(without)["left_out_label"]) == (1, 1)


def test_polygons_far_outside_are_clipped_to_what_is_in_the_image(folder):
    # a band from (0, 10) to (80, 30) that goes on for ever, and a triangle of which one corner is far away
    band = [-1e9, 10, 1e9, 10, 1e9, 30, -1e9, 30]
    ray = [0, 0, 8e6, 8e6, 0, 20]
    path = folder.write([annotation(0, segmentation=[band], bbox=None), annotation(1, segmentation=[ray], bbox=None)])
    index = CocoIndex.from_folder(path)
    first, second = objects(index)
    assert mask_area(first["segmentation"], (60, 80)) == 80 * 20
    assert first["bbox_xywh"] == [0, 10, 80, 20]
    mask = decode_mask(second["segmentation"], (60, 80))
    assert mask[30, 20]
    assert mask[30, 29]
    assert not mask[30, 32]  # above the diagonal
    assert not mask[59, 20]  # below the lower edge, which is 20 pixels under the diagonal at its left end
    assert faults(index)["out_of_bounds"] == 2


def test_an_outline_without_end_is_refused(folder):
    zigzag = [value for number in range(400_000) for value in (number % 2 * 80, number % 60)]
    index = CocoIndex.from_folder(folder.write([annotation(0, segmentation=[zigzag])]))
    assert (faults(index)["bad_polygon"], objects(index)[0]["segmentation"]) == (1, None)


@pytest.mark.parametrize(
    ("flag", "is_crowd"), [("0", 0), ("1", 1), (0.0, 0), (True, 1), ("false", 0), (None, 0), ("x", 0)]
)
def test_flags(folder, flag, is_crowd):
    index = CocoIndex.from_folder(folder.write([annotation(0, iscrowd=flag), annotation(1)]))
    assert [o["iscrowd"] for o in objects(index)] == [bool(is_crowd), False]
    assert faults(index).get("bad_flag", 0) == (flag == "x")


def test_a_file_of_crowds_alone_is_named(folder):
    index = CocoIndex.from_folder(folder.write([annotation(0, iscrowd=1), annotation(1, iscrowd="1")]))
    assert faults(index) == {"crowd": 2, "all_crowd": 1}
    assert "all_crowd" not in faults(CocoIndex.from_folder(folder.write([annotation(0, iscrowd=1), annotation(1)])))
    assert faults(CocoIndex.from_folder(folder.write([]))) == {"unused_category": 1}


@pytest.mark.parametrize(
    ("image_id", "reference"),
    [("001", "001"), ("a/1", " a/1 "), (2**70, 2**70), ("7", 7), (7, "7"), (7.0, 7), ("001", 1), (5, "005")],
)
def test_ids_and_references_to_them_are_read_alike(folder, image_id, reference):
    images = [{"id": image_id, "file_name": "0.png", "width": 80, "height": 60}]
    index = CocoIndex.from_folder(folder.write([annotation(0, image_id=reference)], images=images))
    assert (len(objects(index)), faults(index)) == (1, {})
    assert abs(index.record(0)["image_id"]) < 2**63
    assert index.image_ids.find(reference) == index.record(0)["image_id"]


def test_ids_that_differ_stay_apart(folder):
    names = ("1", "01", "001", 2, 2**64, -(2**64))
    images = [{"id": id_, "file_name": f"{i}.png", "width": 80, "height": 60} for i, id_ in enumerate(names)]
    labels = [annotation(i, image_id=id_) for i, id_ in enumerate(names)]
    index = CocoIndex.from_folder(folder.write(labels, images=images))
    assert [[o["id"] for o in objects(index, row)] for row in range(6)] == [[0], [1], [2], [3], [4], [5]]
    assert len(set(index.table["image_id"].to_pylist())) == 6
    # 1 is the id "1"; other leading zeros could be either of two
    assert index.image_ids.find(1) == index.image_ids.find("1")
    assert index.image_ids.find("0001") == index.image_ids.find("1")
    assert CocoIndex.from_folder(folder.write(labels, images=images)).image_ids.written


def test_category_ids_as_texts(folder):
    path = folder.write([annotation(0, category_id="b")], categories=(("crack", "a"), ("hole", "b")))
    index = CocoIndex.from_folder(path)
    assert (index.names, objects(index)[0]["category"]) == (("hole",), "hole")


def test_an_id_of_two_categories_names_neither(folder):
    labels = [annotation(0, category_id=1), annotation(1, image_id=1, category_id=2)]
    path = folder.write(labels, num_images=2, categories=(("gear", 1), ("bolt", 1), ("nut", 2)))
    index = CocoIndex.from_folder(path)
    assert (index.names, [index.record(row)["image_id"] for row in range(len(index))]) == (("nut",), [1])
    assert (faults(index)["ambiguous_category_id"], faults(index)["unknown_category"]) == (1, 1)
    # the same row twice says the same thing
    same = folder.write(labels, num_images=2, categories=(("gear", 1), ("Gear ", 1), ("nut", 2)))
    assert CocoIndex.from_folder(same).names == ("gear", "nut")
    # all of it ambiguous: nothing is left, and the message says why
    with pytest.raises(UserError, match="several names"):
        CocoIndex.from_folder(folder.write([annotation(0)], categories=(("gear", 1), ("bolt", 1))))


def test_an_id_of_two_images_names_neither(folder):
    images = [{"id": id_, "file_name": f"{i}.png", "width": 80, "height": 60} for i, id_ in enumerate((0, 0, 1))]
    index = CocoIndex.from_folder(folder.write([annotation(0), annotation(1, image_id=1)], images=images))
    assert (index.table["file_name"].to_pylist(), faults(index)["ambiguous_image_id"]) == (["2.png"], 2)


def test_shares_of_the_image_are_no_pixels(folder):
    share = {"bbox": [0.1, 0.1, 0.7, 0.7], "segmentation": [square(0.1, 0.1, 0.7)]}
    path = folder.write([annotation(0, **share), annotation(1, image_id=1)], num_images=2)
    index = CocoIndex.from_folder(path)
    assert (index.table["image_id"].to_pylist(), faults(index)["shares"]) == ([1], 1)
    for change in ({"segmentation": []}, {"bbox": None}):
        assert (
            faults(
                CocoIndex.from_folder(
                    folder.write([annotation(0, **share | change), annotation(1, image_id=1)], num_images=2)
                )
            )["shares"]
            == 1
        )
    with pytest.raises(UserError, match="shares of the image, not pixels"):
        CocoIndex.from_folder(folder.write([annotation(0, **share)]))
    report = CocoIndex.from_folder(folder.path, allow_empty=True)
    assert (len(report), faults(report)["shares"]) == (0, 1)
    # a corner pixel in whole numbers, and an object that begins in the corner, are pixels
    corner = [
        annotation(0, bbox=[0, 0, 1, 1], segmentation=[square(0, 0, 1)]),
        annotation(1, bbox=[0.2, 0.2, 0.9, 1.5]),
    ]
    assert "shares" not in faults(CocoIndex.from_folder(folder.write(corner)))


def test_another_file_of_the_same_name_is_no_substitute(folder):
    def listed(*names: str) -> list[dict]:
        return [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(names)]

    labels = [annotation(0), annotation(1, image_id=1)]
    path = folder.write(labels, images=listed("0.png", "1.png"))
    folder.write(labels, images=listed("0.png", "cam1/1.png"), draw=False)
    with pytest.raises(ImageError, match=r"1 listed .*cam1/1\.png"):
        CocoIndex.from_folder(path)
    index = CocoIndex.from_folder(path, on_bad_image="skip")
    assert (index.table["file_name"].to_pylist(), faults(index)["missing_image"]) == (["0.png"], 1)
    # two listings of one base name, neither where it is said to be
    folder.write(labels, images=listed("cam0/0.png", "cam1/0.png"), draw=False)
    with pytest.raises(UserError, match="2 x image listed"):
        CocoIndex.from_folder(path, on_bad_image="skip")
    # a set that was moved as a whole, from another machine and another system
    folder.write(labels, images=listed("/home/me/set/0.png", "C:\\set\\1.png"), draw=False)
    assert len(CocoIndex.from_folder(path)) == 2


def test_names_in_another_unicode_form(folder):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    for on_disk, in_file in ((composed, decomposed), (decomposed, composed)):
        folder.path = folder.path.parent / f"split{len(on_disk)}"
        folder.write([annotation(0)], images=[{"id": 0, "file_name": on_disk, "width": 80, "height": 60}])
        folder.write([annotation(0)], images=[{"id": 0, "file_name": in_file, "width": 80, "height": 60}], draw=False)
        index = CocoIndex.from_folder(folder.path)
        assert index.record(0)["path"].endswith(on_disk)
        assert faults(index) == {"other_unicode_form": 1}


def test_labels_of_one_picture_under_two_sizes_cannot_be_joined(folder):
    images = [
        {"id": 0, "file_name": "0.png", "width": 80, "height": 60},
        {"id": 1, "file_name": "0.png", "width": 160, "height": 120},
        {"id": 2, "file_name": "1.png", "width": 80, "height": 60},
    ]
    path = folder.write([annotation(0)], images=[images[0], images[2]])
    folder.write([annotation(i, image_id=i) for i in range(3)], images=images, draw=False)
    index = CocoIndex.from_folder(path)
    assert (index.table["image_id"].to_pylist(), faults(index)["unclear_image"]) == ([2], 1)


def test_an_absent_object_does_not_hide_another_one(folder):
    empty = {"bbox": [10, 10, 0, 0], "segmentation": []}
    labels = [annotation(0), annotation(1, **empty), annotation(2, image_id=1, **empty)]
    index = CocoIndex.from_folder(folder.write(labels, num_images=2))
    # an empty label beside a good one of its category is only dropped; alone, it would make a negative of its image
    assert [[o["id"] for o in objects(index, row)] for row in range(len(index))] == [[0]]
    assert (faults(index)["empty_object"], faults(index)["unclear_image"]) == (2, 1)


def test_python_numbers_in_json(folder):
    path = folder.write([annotation(0), annotation(1, bbox=[float("nan")] * 4), annotation(2, area=float("inf"))])
    assert "NaN" in (path / "_annotations.coco.json").read_text()
    index = CocoIndex.from_folder(path)
    assert (len(objects(index)), faults(index)) == (3, {"mask_without_box": 1})


def test_a_kept_index_is_what_was_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "MIN_BYTES", 0)
    monkeypatch.setenv("SAM3LORA_CACHE", str(tmp_path / "cache"))
    images = [{"id": f"a{i}", "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(3)]
    labels = [annotation(i, image_id=f"a{i}") for i in range(3)] + [annotation(3, image_id="a2", category_id=9)]
    path = folder.write(labels, images=images, categories=(("crack", 1), ("hole", 2)))
    read = CocoIndex.from_folder(path)
    [file] = (tmp_path / "cache" / "index").glob("*.arrow")
    kept = CocoIndex.from_folder(path)
    assert kept.table.equals(read.table)
    assert (kept.names, kept.listed_names, faults(kept)) == (read.names, read.listed_names, faults(read))
    assert [kept.image_ids.find(f"a{i}") for i in range(4)] == [read.image_ids.find(f"a{i}") for i in range(4)]
    assert kept.image_ids.written == read.image_ids.written
    # a missing image, and its return
    (path / "0.png").rename(tmp_path / "0.png")
    with pytest.raises(ImageError):
        CocoIndex.from_folder(path)
    (tmp_path / "0.png").rename(path / "0.png")
    assert len(CocoIndex.from_folder(path)) == 2
    # other labels, and a damaged file
    folder.write(labels[:2], images=images)
    assert [len(objects(CocoIndex.from_folder(path), row)) for row in range(3)] == [1, 1, 0]
    for file in (tmp_path / "cache" / "index").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:200])
    assert len(CocoIndex.from_folder(path)) == 3
    assert json.loads((path / "_annotations.coco.json").read_text())["images"] == images


def test_a_number_that_no_list_has_means_no_image_and_no_category(folder):
    """What stands for a text or a large number within the index is no id of the file."""
    images = [
        {"id": id_, "file_name": f"{i}.png", "width": 80, "height": 60} for i, id_ in enumerate(("b", "a", 2**70))
    ]
    names = (("crack", "c"), ("hole", 10**30), ("root", 2))
    foreign = [annotation(i, image_id=i + 1, category_id=2) for i in range(3)]
    foreign += [annotation(5 + i, image_id="b", category_id=i) for i in (1, 3)]
    path = folder.write([*foreign, annotation(9, image_id="a", category_id=2)], images=images, categories=names)
    index = CocoIndex.from_folder(path)
    assert (faults(index)["unknown_image"], faults(index)["unknown_category"]) == (3, 2)
    assert [[o["category"] for o in objects(index, row)] for row in range(len(index))] == [["root"], []]


def test_seven_is_neither_of_two_that_could_be_meant(folder):
    images = [{"id": id_, "file_name": f"{i}.png", "width": 80, "height": 60} for i, id_ in enumerate(("07", "007", 8))]
    index = CocoIndex.from_folder(folder.write([annotation(0, image_id=7), annotation(1, image_id=8)], images=images))
    assert (faults(index)["unknown_image"], index.image_ids.find(7)) == (1, None)


def test_one_file_in_two_spellings_is_one_image(folder):
    images = [
        {"id": i, "file_name": name, "width": 80, "height": 60}
        for i, name in enumerate(("0.png", "./0.png", "../train/0.png", "1.png"))
    ]
    path = folder.write([annotation(0, image_id=1)], num_images=2)
    folder.write([annotation(0, image_id=1)], images=images, draw=False)
    index = CocoIndex.from_folder(path)
    assert [len(objects(index, row)) for row in range(len(index))] == [1, 0]
    assert faults(index) == {"duplicate_file_name": 2}


def test_an_image_listed_with_two_sizes_is_ambiguous(folder):
    images = [
        {"id": 0, "file_name": "0.png", "width": 80, "height": 60},
        {"id": 0, "file_name": "0.png", "width": 40, "height": 30},
        {"id": 1, "file_name": "1.png", "width": 80, "height": 60},
    ]
    path = folder.write([annotation(0)], num_images=2)
    for order in (images, images[::-1]):
        folder.write([annotation(0), annotation(1, image_id=1)], images=order, draw=False)
        index = CocoIndex.from_folder(path)
        assert (index.table["image_id"].to_pylist(), faults(index)["ambiguous_image_id"]) == ([1], 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"bbox": [10,', b'"bbox": [' + b"1" * 5000 + b","),  # Python refuses so many digits
        (b'"segmentation": [[10,', b'"segmentation": [[' + b"1" * 5000 + b","),
        (b'"segmentation": [[10, 10,', b'"segmentation": [["\xff", 10,'),  # no UTF-8
        (b'"segmentation": [[10, 10,', b'"segmentation": [["\\ud800", 10,'),
        (b'"iscrowd": 0', b'"iscrowd": "\\ud800"'),
        (b'"id": 3, "image_id": 0', b'"id": 3, "image_id": "\\ud800"'),
        (b'"id": 3, "image_id": 0', b'"id": 3, "image_id": ' + b"7" * 5000),
    ],
)
def test_texts_that_a_parser_refuses_are_faults(folder, old, new):
    path = folder.write([annotation(3), annotation(4, image_id=1)], num_images=2)
    source = path / "_annotations.coco.json"
    text = source.read_bytes()
    assert old in text
    source.write_bytes(text.replace(old, new, 1))
    index = CocoIndex.from_folder(path)
    assert faults(index)
    assert all(str(fault).isprintable() for fault in index.faults)
    assert index.table["image_id"].to_pylist()[-1] == 1


def test_run_length_masks_keep_only_what_draws_them(folder):
    rle = {"size": [60, 80], "counts": "PPYo0", "name": "é"}
    mask = encode_rle(np.pad(np.ones((20, 20), bool), ((10, 30), (10, 50))))
    path = folder.write([annotation(0, segmentation=mask | {"name": "NAME"}), annotation(1, segmentation=rle)])
    source = path / "_annotations.coco.json"
    source.write_bytes(source.read_bytes().replace(b"NAME", b"\xe9"))
    index = CocoIndex.from_folder(path)
    assert json.loads(objects(index)[0]["segmentation"]) in (mask, None)
    # a space is no character of the code
    spaced = mask | {"counts": mask["counts"][:4] + " " + mask["counts"][4:]}
    assert faults(CocoIndex.from_folder(folder.write([annotation(0, segmentation=spaced)])))["bad_rle"] == 1


def test_a_run_length_mask_far_larger_than_its_image_is_refused(folder):
    large = {"size": [13000, 13000], "counts": [13000 * 13000 // 2, 13000 * 13000 // 2]}
    assert faults(CocoIndex.from_folder(folder.write([annotation(0, segmentation=large)])))["bad_rle"] == 1


def test_lists_that_come_twice_are_refused(folder):
    path = folder.write([annotation(0)])
    source = path / "_annotations.coco.json"
    text = source.read_text()
    source.write_text(text[:-1] + ', "annotations": []}')
    with pytest.raises(UserError, match="'annotations' twice"):
        CocoIndex.from_folder(path)
    # the same word elsewhere is no second list
    content = json.loads(text)
    content["images"][0]["annotations"] = [1]
    source.write_text(json.dumps(content))
    assert len(objects(CocoIndex.from_folder(path))) == 1


def test_names_that_cannot_be_shown_become_plain(folder):
    path = folder.write([annotation(0, category_id=1)], categories=(("ge\nar\x1b[2J", 1), ("bolt", 2)))
    index = CocoIndex.from_folder(path)
    assert (index.names, faults(index)["unprintable_name"]) == (("ge ar [2J",), 1)


def test_an_alias_of_an_id_leaves_the_others():
    table = IdTable(range(40_000))
    for number in range(40_000):
        table.add(number)
    for number in range(20_000, 40_000):
        table.alias(number, number - 20_000)
    assert table.find(39_999) == 19_999
    assert len(table.shared_numbers()) == 20_000


def test_kept_indexes_of_relative_paths_and_without_sizes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "MIN_BYTES", 0)
    monkeypatch.setenv("SAM3LORA_CACHE", str(tmp_path / "cache"))
    path = folder.write([annotation(0)], num_images=1)
    folder.write([annotation(0)], images=[{"id": 0, "file_name": "0.png"}], draw=False)
    monkeypatch.chdir(path)
    assert CocoIndex.from_folder(".").record(0)["path"] == str(path / "0.png")
    monkeypatch.chdir(tmp_path)
    # kept, although the size is that of the image: another image has another one
    assert len(list((tmp_path / "cache/index").glob("*.arrow"))) == 1
    assert CocoIndex.from_folder(path).record(0)["width"] == 80
    cv2.imwrite(str(path / "0.png"), np.zeros((90, 100, 3), np.uint8))
    assert CocoIndex.from_folder(path).record(0)["width"] == 100
    assert len(list((tmp_path / "cache/index").glob("*.lock"))) <= 2


def test_images_named_by_their_files(folder):
    labels = [annotation(0, image_id="0.png"), annotation(1, image_id="1"), annotation(2, image_id="2.jpg")]
    images = [{"id": 10 + i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(3)]
    index = CocoIndex.from_folder(folder.write(labels, images=images))
    # "1" is a number for all that the file says
    assert [len(objects(index, row)) for row in range(3)] == [1, 0, 0]
    assert faults(index) == {"named_by_file": 1, "unknown_image": 2}


def test_a_mask_that_leaves_the_image_by_more_than_rounding_is_clipped(folder):
    for edge, is_told in ((-1.0, False), (-1.5, True)):
        change = {"bbox": [edge, 10, 20, 20], "segmentation": [square(edge, 10, 20)]}
        index = CocoIndex.from_folder(folder.write([annotation(0, **change)]))
        assert ("out_of_bounds" in faults(index)) == is_told
