"""Ten thousand drawn annotations and results: none ends the program, and each is kept or counted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora.data import label_table
from sam3lora.data.augment import Placement
from sam3lora.data.coco import CocoIndex
from sam3lora.data.coco_results import read_results
from sam3lora.data.masks import decode_mask, place_mask
from sam3lora.data.plain_annotations import find_plain

from .odd_labels import HEIGHT, WIDTH, odd_annotation

NUM_ANNOTATIONS, NUM_IMAGES = 10_000, 2_500
DROPPED = (
    "bad_annotation",
    "unknown_image",
    "unknown_category",
    "unreadable_label",
    "shares",
    "empty_object",
    "duplicate_annotation",
    "left_out_label",
)
DROPPED_RESULTS = (
    *("bad_result", "bad_score", "unreadable_label", "shares", "empty_object"),
    *("result_without_mask", "result_of_unclear_image", "duplicate_annotation"),
)


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    cv2.imwrite(str(folder / "0.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    for number in range(1, NUM_IMAGES):
        (folder / f"{number}.jpg").hardlink_to(folder / "0.jpg")
    rng = random.Random(0)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(NUM_IMAGES)],
        "annotations": [odd_annotation(rng, number, NUM_IMAGES) for number in range(NUM_ANNOTATIONS)],
        "categories": [{"id": 1, "name": "crack"}, {"id": 2, "name": "hole"}, {"id": "007", "name": "root"}],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def counts(faults) -> dict[str, int]:
    return {fault.kind: fault.count for fault in faults}


def test_every_label_is_kept_or_counted(odd_set):
    index = CocoIndex.from_folder(odd_set)
    kept = [label for record in index.table.to_pylist() for label in record["annotations"]]
    found = counts(index.faults)
    assert len(kept) + sum(found.get(kind, 0) for kind in DROPPED) == NUM_ANNOTATIONS
    assert len(index) + found["unclear_image"] == NUM_IMAGES
    assert len(kept) > 1000
    for label in kept:  # what is kept can be drawn
        x, y, width, height = label["bbox_xywh"]
        assert 0 <= x < x + width <= WIDTH
        assert 0 <= y < y + height <= HEIGHT
        assert decode_mask(label["segmentation"], (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH)
        place_mask(label["segmentation"], (HEIGHT, WIDTH), Placement(flip=True), 64)


def test_bulk_reading_gives_what_reading_one_by_one_gives(odd_set, monkeypatch):
    fast = CocoIndex.from_folder(odd_set)

    def find_none(*args):
        found = find_plain(*args)
        found.is_plain_A[:] = False
        return found

    monkeypatch.setattr(label_table, "find_plain", find_none)
    slow = CocoIndex.from_folder(odd_set)
    rows = [index.table.to_pylist() for index in (fast, slow)]
    for records in rows:
        for label in (label for record in records for label in record["annotations"]):
            label["segmentation"] = json.loads(label["segmentation"] or "null")
    assert rows[0] == rows[1]
    assert counts(fast.faults) == counts(slow.faults)


def test_every_result_is_kept_or_counted(odd_set, tmp_path):
    index = CocoIndex.from_folder(odd_set)
    rng = random.Random(1)
    entries = []
    while len(entries) < NUM_ANNOTATIONS:
        entry = odd_annotation(rng, len(entries), NUM_IMAGES)
        if isinstance(entry, dict):  # an id that the split lacks would end the reading: the file is of another split
            ids = (index.image_ids.find(entry.get("image_id")), index.category_ids.find(entry.get("category_id")))
            if None in ids:
                continue
        entries.append(entry)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(entries))
    found = read_results(file, index)
    dropped = counts(found.faults)
    num_masks_lost = dropped["result_without_mask"]
    assert found.num_listed == NUM_ANNOTATIONS
    assert len(found.results) + sum(dropped.get(kind, 0) for kind in DROPPED_RESULTS) == NUM_ANNOTATIONS
    assert num_masks_lost < NUM_ANNOTATIONS / 10
    assert len(found.results) > 1000


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_stays_below_a_gigabyte(odd_set):
    code = (
        "import sys; from pathlib import Path; from sam3lora.data.coco import CocoIndex;"
        "CocoIndex.from_folder(sys.argv[1]); print(Path('/proc/self/status').read_text())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(odd_set)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    peak_kb = int(done.stdout.split("VmHWM:")[1].split()[0])  # unlike ru_maxrss not inherited from this process
    assert peak_kb < 1_000_000
