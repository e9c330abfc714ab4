"""Counting and selecting by columns gives what going through the records gives."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.index_columns import keep_annotations, object_columns
from sam3lora.data.label_table import SCHEMA
from sam3lora.data.sample import DecodeSettings, record_queries, rows_with_queries

from .random_index import CATEGORIES, draw_table


def test_an_index_without_images_or_without_objects_has_no_columns():
    for table in (SCHEMA.empty_table(), keep_annotations(draw_table(0), np.zeros(200, dtype=bool))):
        objects = object_columns(table)
        assert objects.categories == ()
        assert objects.count_per_image().tolist() == [0] * table.num_rows
        assert objects.count_per_category() == {}
        assert [len(values) for values in objects.count_pairs()] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_the_records(seed):
    table = draw_table(seed)
    objects, records = object_columns(table), table.to_pylist()
    listed = [(row, a) for row, record in enumerate(records) for a in record["annotations"]]
    assert objects.num_images == 30
    assert objects.rows_T.tolist() == [row for row, _ in listed]
    assert [objects.categories[code] for code in objects.codes_T] == [a["category"] for _, a in listed]
    assert objects.crowd_T.tolist() == [a["iscrowd"] for _, a in listed]
    assert objects.count_per_image().tolist() == [len(record["annotations"]) for record in records]
    assert objects.count_per_category() == Counter(a["category"] for _, a in listed)
    # "Red Bolt" and "gear" as one
    rows, positions, counts, keys = objects.count_pairs(lambda name: name[-1], ~objects.crowd_T)
    found = {(row, keys[at]): n for row, at, n in zip(rows.tolist(), positions, counts.tolist(), strict=True)}
    assert found == Counter((row, a["category"][-1]) for row, a in listed if not a["iscrowd"])


@pytest.mark.parametrize("seed", range(5))
def test_selected_categories_keep_all_images_and_the_order(seed):
    table = draw_table(seed)
    index = CocoIndex(table, dict(enumerate(dict.fromkeys(object_columns(table).categories))))
    wanted = index.names[:2]
    selected = index.select_categories(wanted)
    expected = table.to_pylist()
    for record in expected:
        record["annotations"] = [a for a in record["annotations"] if a["category"] in wanted]
    assert selected.table.to_pylist() == expected
    assert selected.table.schema == SCHEMA
    assert selected.names == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exhaustive": False},
        {"exhaustive": ("weed",)},
        {"num_negatives": 0},
        {"negative_prompts": ("rust",), "exhaustive": False},
        {"negative_prompts": ("crack",), "exhaustive": False},
        {"prompts_map": dict.fromkeys(CATEGORIES, "defect")},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_rows_with_queries_are_those_whose_record_has_one(seed, changes):
    table = draw_table(seed)
    settings = dataclasses.replace(DecodeSettings(names=CATEGORIES[:1]), **changes)
    expected = [row for row, record in enumerate(table.to_pylist()) if record_queries(record, settings)]
    assert rows_with_queries(table, settings) == expected
    assert 0 < len(expected) <= 30
