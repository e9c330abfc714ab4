"""Checking a data set: counts, faults, leaks between splits, and the printed tables."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sam3lora.data import inspection
from sam3lora.data.check import check_folder
from sam3lora.data.report_tables import print_check
from sam3lora.data.split.leakage import count_augmented_copies, find_leaks, source_name
from sam3lora.errors import UserError

from .coco_builder import annotation, square

HASHES = [c * 32 for c in "abcdef"]


def test_counts_sizes_negatives_and_faults(folder):
    big = annotation(1, bbox=[0, 0, 60, 60], segmentation=[square(0, 0, 60)])
    # a thin diagonal: its box is of medium size, its mask is small
    thin = annotation(2, bbox=[0, 0, 50, 50], segmentation=[[0, 0, 2, 0, 50, 50, 48, 50]])
    path = folder.write([annotation(0), big, thin, annotation(3, iscrowd=1)], num_images=3)
    (path / "2.png").write_bytes(b"broken")
    report = check_folder(path.parent)
    [split] = report.splits
    assert (split.name, split.num_images, split.num_objects, split.num_crowd) == ("train", 3, 3, 1)
    assert (split.num_negatives, split.max_objects_per_image) == (2, 3)
    assert split.sizes == {"small": 2, "medium": 1, "large": 0}
    assert split.categories == {"crack": {"images": 1, "objects": 3}}
    assert {fault.kind: fault.count for fault in split.faults} == {"crowd": 1, "unreadable_image": 1}
    assert report.num_faults == 2
    fault = json.loads(json.dumps(report.to_dict()))["splits"][0]["issues"][1]
    assert (fault["kind"], fault["count"]) == ("unreadable_image", 1)
    assert fault["examples"][0].startswith("image 2 2.png")


def test_wrong_sizes_and_too_many_objects_are_reported(folder):
    images = [{"id": 0, "file_name": "0.png", "width": 160, "height": 120}]
    path = folder.write([annotation(i) for i in range(201)], images=images)
    [split] = check_folder(path).splits
    assert {fault.kind for fault in split.faults} == {"size_mismatch", "many_objects"}
    assert (split.max_objects_per_query, split.num_images_above_max_detections) == (201, 1)


def test_processes_find_what_threads_find(folder, monkeypatch):
    # pieces of two images, so that their order matters
    monkeypatch.setattr(inspection, "_ROWS", 2)
    monkeypatch.setattr(inspection, "_PIECES_AHEAD", 2)
    monkeypatch.setattr(inspection, "_ROWS_WORTH_PROCESSES", 1)
    annotations = [annotation(i, image_id=i, segmentation=[square(0, 0, 12 * i + 3)]) for i in range(9)]
    path = folder.write(annotations, num_images=11)
    for number in (3, 4, 9):
        (path / f"{number}.png").write_bytes(b"broken")
    on_threads, in_processes = (check_folder(path, num_processes=number).to_dict() for number in (0, 2))
    assert in_processes == on_threads
    [split] = in_processes["splits"]
    assert split["sizes"] == {"small": 3, "medium": 6, "large": 0}
    [fault] = [issue for issue in split["issues"] if issue["kind"] == "unreadable_image"]
    assert fault["count"] == 3
    assert [example.split()[2] for example in fault["examples"]] == ["3.png:", "4.png:", "9.png:"]


def test_leaks_between_splits_are_found_by_content_name_and_number():
    train = {f"photo_jpg.rf.{HASHES[0]}.jpg": "1", "clip1_000018.png": "2", "x.png": "3"}
    valid = {
        f"photo_jpg.rf.{HASHES[1]}.jpg": "4",  # another export of the same picture
        "clip1_000020.png": "5",  # two frames later
        "clip1_000030.png": "6",
        "y.png": "3",  # the same file under another name
        "z.png": "7",
    }
    leaks = {leak.kind: leak.count for leak in find_leaks({"train": train, "valid": valid})}
    assert leaks == {"same_content": 1, "same_source": 1, "neighbouring_frames": 1}
    assert find_leaks({"train": train, "valid": {"z.png": "7"}}) == []
    # splits may number their own pictures: an equal name alone is no leak, unless one of the files is an export
    assert find_leaks({"train": {"00000.jpg": "a"}, "valid": {"00000.jpg": "b"}}) == []
    [leak] = find_leaks({"train": {"00000_jpg.jpg": "a"}, "valid": {f"00000_jpg.rf.{HASHES[0]}.jpg": "b"}})
    assert (leak.kind, leak.count) == ("same_source", 1)


def test_augmented_copies():
    names = [f"photo_jpg.rf.{h}.jpg" for h in HASHES[:3]] + [f"other_jpg.rf.{HASHES[3]}.jpg", "plain.jpg", "plain2.jpg"]
    assert source_name(names[0]) == "photo_jpg"
    assert count_augmented_copies(names) == 2


def test_copied_image_is_a_leak(folder, tmp_path):
    folder.write([annotation(0)])
    folder.path = tmp_path / "valid"
    folder.write([annotation(0)])
    report = check_folder(tmp_path)
    assert [(leak.kind, leak.splits, leak.count) for leak in report.leaks] == [("same_content", ("train", "valid"), 1)]
    stream = io.StringIO()
    print_check(report, Console(file=stream, width=200))
    assert "identical files" in stream.getvalue()
    assert "train/0.png = valid/0.png" in stream.getvalue()


def test_only_unusable_folders_raise(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(UserError, match=r"_annotations\.coco\.json.*readme\.txt"):
        check_folder(tmp_path)
    # images missing, annotations broken: reported
    path = folder.write([annotation(0, segmentation=[[1, 2]]), annotation(1, image_id=1)], num_images=2)
    (path / "1.png").unlink()
    [split] = check_folder(tmp_path).splits
    assert {fault.kind for fault in split.faults} >= {"missing_image", "short_polygon"}


def test_real_data_sets(shared_data):
    potholes = check_folder(shared_data / "potholes_gopro")
    train, valid = potholes.splits
    assert (train.num_negatives, valid.num_negatives) == (30, 15)
    assert list(train.categories) == ["pothole"]
    assert "neighbouring_frames" in {leak.kind for leak in potholes.leaks}
    assert check_folder(shared_data / "strawberry" / "train").splits[0].num_augmented_copies > 50
