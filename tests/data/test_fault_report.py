"""What is told of the faults of labels: the right counts, the lost first, and nothing where there is nothing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sam3lora.data.check import check_folder
from sam3lora.data.fault_report import (
    MAX_LINES,
    count_left_out,
    fault_lines,
    fault_summary,
    left_out_sentence,
    split_faults,
    table_rows,
)
from sam3lora.data.faults import IMAGES_LEFT_OUT, KINDS, LABELS_LEFT_OUT, LEVELS, LOST, FaultLog
from sam3lora.data.report_tables import print_check

from .coco_builder import annotation
from .faulty_labels import FAULTS, add_faults


def log_of(**kinds: int) -> FaultLog:
    log = FaultLog()
    for kind, count in kinds.items():
        for number in range(count):
            log.add(kind, f"{kind} {number}")
    return log


@pytest.fixture
def two_splits() -> list[dict]:
    train = log_of(crowd=5, out_of_bounds=9, missing_image=4, unknown_category=2)
    valid = log_of(unknown_category=3, bad_polygon=1)
    return split_faults("train", train) + split_faults("valid", valid)


def test_a_clean_set_tells_nothing():
    # Notes are no faults either.
    for log in (FaultLog(), log_of(unused_category=3, crowd=2)):
        faults = split_faults("train", log)
        assert faults == fault_lines(faults) == []
        assert fault_summary(faults, "data") == left_out_sentence(faults) == ""
        assert table_rows(faults) == ([], [])
        assert count_left_out(faults) == {"labels": 0, "images": 0, "results": 0}


def test_what_is_lost_comes_first_and_goes_into_files(two_splits):
    assert [(fault["split"], fault["kind"], fault["count"]) for fault in two_splits] == [
        ("train", "missing_image", 4),
        ("train", "unknown_category", 2),
        ("train", "out_of_bounds", 9),
        ("valid", "unknown_category", 3),
        ("valid", "bad_polygon", 1),
    ]
    assert json.loads(json.dumps(two_splits)) == two_splits


def test_whole_labels_and_images_are_counted(two_splits):
    # Neither what is changed (out_of_bounds) nor a part of a label (bad_polygon).
    assert count_left_out(two_splits) == {"labels": 5, "images": 4, "results": 0}
    assert left_out_sentence(two_splits) == "5 labels and 4 images are left out"
    assert left_out_sentence(split_faults("a", log_of(missing_image=1))) == "1 image is left out"
    assert left_out_sentence(split_faults("a", log_of(bad_rle=2))) == ""
    # What is wrong with a predictions file leaves out results, and no labels.
    results = split_faults("mine.json", log_of(bad_score=3, empty_object=1), labels="results")
    assert left_out_sentence([*two_splits, *results]) == "5 labels, 4 images and 4 results are left out"
    assert {kind for kind, (_, _, level) in KINDS.items() if level == LOST} >= IMAGES_LEFT_OUT | LABELS_LEFT_OUT


def test_one_line_for_a_kind(two_splits):
    missing, unlisted, *_ = lines = fault_lines(two_splits)
    assert len(lines) == 4
    # Missing images are named; of the other kinds one example is enough. Counts are of both splits and of each.
    assert missing.startswith("4 x ")
    assert "missing_image 0; missing_image 1; missing_image 2" in missing
    assert unlisted.startswith("5 x ")
    assert "train 2, valid 3" in unlisted
    assert "unknown_category 0" in unlisted
    assert "unknown_category 1" not in unlisted
    assert lines[-1].startswith("9 x ")  # changed, so after what is lost


def test_a_summary_is_short():
    kinds = [kind for kind, (_, _, level) in KINDS.items() if level == LOST][: MAX_LINES + 3]
    faults = split_faults("train", log_of(**dict.fromkeys(kinds, 1)))
    heading, *lines, more, details = fault_summary(faults, "my data").splitlines()
    assert left_out_sentence(faults) in heading
    assert len(lines) == MAX_LINES
    assert "and 3 more" in more
    assert details.endswith("sam3lora data check 'my data'")
    assert "more" not in fault_summary(faults[:MAX_LINES], "data")


def test_a_table_has_a_column_for_each_split(two_splits):
    splits, rows = table_rows(two_splits)
    assert splits == ["train", "valid"]
    assert [row.counts for row in rows] == [["4", "0"], ["2", "3"], ["0", "1"], ["9", "0"]]
    assert [row.level for row in rows] == ["lost", "lost", "lost", "changed"]
    assert rows[1].examples == "train: unknown_category 0; unknown_category 1; valid: " + "; ".join(
        f"unknown_category {number}" for number in range(3)
    )
    # With one split no name is needed.
    [row] = table_rows(two_splits[-1:])[1]
    assert row.examples == "bad_polygon 0"


def test_check_prints_levels_and_what_is_left_out(folder, tmp_path):
    add_faults(folder.write([annotation(0), annotation(1, iscrowd=1)]))
    report = check_folder(tmp_path)
    assert {fault.kind: fault.count for fault in report.splits[0].faults} == FAULTS | {"crowd": 1}
    stream = io.StringIO()
    print_check(report, Console(file=stream, width=200))
    printed = stream.getvalue()
    levels = [cells[1].strip() for line in printed.splitlines() if len(cells := line.split("│")) == 7]
    assert levels == sorted(levels, key=LEVELS.index) == ["lost", "lost", "changed", "note"]
    assert printed.splitlines()[-1] == "1 label and 1 image are left out"
