"""The labels of an annotation file as an Arrow table: plain annotations in bulk, the others one by one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from sam3lora.data.annotations import LabelError, clean_annotation
from sam3lora.data.coco_file import AnnotationEntry
from sam3lora.data.faults import FaultLog
from sam3lora.data.ids import id_key
from sam3lora.data.listed_entries import ListedCategories, ListedImages
from sam3lora.data.plain_annotations import find_plain

ANNOTATION = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        ("category", pa.string()),  # the category's name, one spelling for all ids that share it
        ("bbox_xywh", pa.list_(pa.float64())),
        ("segmentation", pa.string()),
        ("iscrowd", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("file_name", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("annotations", pa.list_(ANNOTATION)),
    ]
)

_ENTRIES_AT_A_TIME = 20_000
_IMAGES_PER_BATCH = 10_000  # of Arrow: its texts stay below 2 GB
_MAX_ID = 2**62
_PLAIN_FLAGS = (0, None)


@dataclass
class _Labels:
    """Cleaned annotations as columns: pieces that are joined in the end."""

    rows: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    categories: list[np.ndarray] = field(default_factory=list)
    boxes_xywh: list[np.ndarray] = field(default_factory=list)
    is_crowd: list[np.ndarray] = field(default_factory=list)
    masks: list[bytes | None] = field(default_factory=list)

    def add(
        self,
        rows: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        ids: Sequence[int],
        categories: Sequence[int],
        boxes_xywh: Any,
        is_crowd: Sequence[bool] | np.ndarray,
        masks: Sequence[bytes | None],
    ) -> None:
        for column, values in (
            (self.rows, rows),
            (self.positions, positions),
            (self.ids, ids),
            (self.categories, categories),
        ):
            column.append(np.asarray(values, dtype=np.int64))
        self.boxes_xywh.append(np.asarray(boxes_xywh, dtype=np.float64).reshape(-1, 4))
        self.is_crowd.append(np.asarray(is_crowd, dtype=bool))
        self.masks += masks


class LabelTable:
    """Cleans the annotations of a file, and makes the table of those images whose labels can all be read."""

    def __init__(self, images: ListedImages, categories: ListedCategories, log: FaultLog) -> None:
        self._images, self._categories, self._log = images, categories, log
        self._sizes_hw = np.array(images.sizes_hw, dtype=np.int64).reshape(-1, 2)
        self._labels = _Labels()
        self._repeated: set[Any] = set()
        self._first_of: dict[Any, dict[str, Any]] = {}  # repeated annotation id -> its first annotation
        self._seen_in_merged: set[tuple[Any, ...]] = set()
        self._emptied: set[tuple[int, int]] = set()  # (row, category) of objects without area
        self._largest_id = 0
        self._numbers_by_name: dict[str, set[int]] | None = None
        # By the ids as the file writes them, where these are the numbers that stand for them.
        self._row_of_id = {n: row for n, row in images.row_of.items() if n not in images.ids.written}
        self._plain_categories = categories.names.keys() - categories.ids.written.keys()

    def add(self, entries: Sequence[AnnotationEntry]) -> None:
        """Clean all annotations of the file."""
        keys = [entry.id if type(entry.id) is int else id_key(entry.id) for entry in entries]
        if len(set(keys)) < len(keys):
            self._repeated = {key for key, count in Counter(keys).items() if count > 1 and key is not None}
        self._largest_id = max((key for key in keys if isinstance(key, int) and key < _MAX_ID), default=0)
        for start in range(0, len(entries), _ENTRIES_AT_A_TIME):
            self._add_chunk(entries[start : start + _ENTRIES_AT_A_TIME], start)

    def finish(self) -> tuple[pa.Table, set[int]]:
        """The table, and the numbers of the categories in use."""
        labels = self._labels
        rows, positions, ids, categories = (
            np.concatenate([np.empty(0, np.int64), *pieces])
            for pieces in (labels.rows, labels.positions, labels.ids, labels.categories)
        )
        boxes_xywh = np.concatenate([np.empty((0, 4)), *labels.boxes_xywh])
        is_crowd = np.concatenate([np.empty(0, bool), *labels.is_crowd])
        if self._emptied:
            kept = set(zip(rows.tolist(), categories.tolist(), strict=True))
            self._images.unclear |= {row for row, category in self._emptied if (row, category) not in kept}
        for row in sorted(self._images.unclear):
            self._log.add("unclear_image", self._images.label(row))
        is_clear = np.isin(rows, sorted(self._images.unclear), invert=True)
        if is_clear.any() and is_crowd[is_clear].all():
            self._log.add("all_crowd", f"{int(is_clear.sum())} crowd regions")
        if not is_clear.all():
            self._log.add("left_out_label", count=int((~is_clear).sum()))
        order = np.lexsort((positions, rows))
        ends = np.searchsorted(rows[order], np.arange(len(self._sizes_hw)), side="right")
        batches = []
        for start in range(0, len(self._sizes_hw), _IMAGES_PER_BATCH):
            stop = min(start + _IMAGES_PER_BATCH, len(self._sizes_hw))
            first = ends[start - 1] if start else 0
            chosen = order[first : ends[stop - 1]]
            annotations = self._annotation_array(chosen, ids, categories, boxes_xywh, is_crowd)
            offsets = np.concatenate([[0], ends[start:stop] - first])
            batches.append(self._image_batch(range(start, stop), offsets, annotations))
        return pa.Table.from_batches(batches, schema=SCHEMA), set(np.unique(categories[is_clear]).tolist())

    def _annotation_array(
        self, chosen: np.ndarray, ids: np.ndarray, categories: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
    ) -> pa.StructArray:
        names = self._categories.names
        masks = [self._labels.masks[position] for position in chosen]
        columns = [
            pa.array(ids[chosen]),
            pa.array(categories[chosen]),
            pa.array([names[category] for category in categories[chosen].tolist()], type=pa.string()),
            pa.ListArray.from_arrays(np.arange(len(chosen) + 1, dtype=np.int32) * 4, boxes[chosen].ravel()),
            pa.array(masks, type=pa.binary()).cast(pa.string()),
            pa.array(is_crowd[chosen]),
        ]
        return pa.StructArray.from_arrays(columns, fields=list(ANNOTATION))

    def _image_batch(self, rows: range, offsets: np.ndarray, annotations: pa.StructArray) -> pa.RecordBatch:
        images, part = self._images, slice(rows.start, rows.stop)
        columns = [
            pa.array(images.numbers[part], type=pa.int64()),
            pa.array(images.paths[part], type=pa.string()),
            pa.array(images.file_names[part], type=pa.string()),
            pa.array(self._sizes_hw[part, 1]),
            pa.array(self._sizes_hw[part, 0]),
            pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), annotations),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        left = [row - rows.start for row in rows if row not in images.unclear]
        return batch if len(left) == len(rows) else batch.take(pa.array(left, type=pa.int64()))

    def _add_chunk(self, entries: Sequence[AnnotationEntry], start: int) -> None:
        images = self._images
        rows = [self._row_of_id.get(e.image_id, -1) if type(e.image_id) is int else -1 for e in entries]
        simple = [
            number
            for number, (entry, row) in enumerate(zip(entries, rows, strict=True))
            if row >= 0
            and row not in images.merged
            and type(entry.category_id) is int
            and entry.category_id in self._plain_categories
            and type(entry.id) is int
            and 0 <= entry.id < _MAX_ID
            and entry.id not in self._repeated
            and entry.iscrowd in _PLAIN_FLAGS
        ]
        if simple:
            plain = find_plain(
                [entries[number] for number in simple], self._sizes_hw[[rows[number] for number in simple]]
            )
            self._add_plain(entries, rows, start, simple, plain)
            odd = set(range(len(entries))) - {n for n, good in zip(simple, plain.is_plain_A, strict=True) if good}
        else:
            odd = set(range(len(entries)))
        for number in sorted(odd):
            self._add_one(entries[number], start + number)

    def _add_plain(self, entries: Any, rows: list[int], start: int, simple: list[int], plain: Any) -> None:
        chosen = np.flatnonzero(plain.is_plain_A)
        numbers = [simple[place] for place in chosen]
        masks = [plain.masks_A[place] for place in chosen]
        self._labels.add(
            [rows[number] for number in numbers],
            [start + number for number in numbers],
            [entries[number].id for number in numbers],
            [entries[number].category_id for number in numbers],
            plain.boxes_xywh_A4[chosen],
            np.zeros(len(chosen), dtype=bool),
            masks,
        )
        bare = [number for number, mask in zip(numbers, masks, strict=True) if mask is None]
        if bare:
            examples = [_where(entries[number], start + number) for number in bare[:3]]
            self._log.add("box_without_mask", *examples, count=len(bare))

    def _add_one(self, entry: AnnotationEntry, position: int) -> None:
        images, categories, log = self._images, self._categories, self._log
        where = _where(entry, position)
        image = images.ids.find(entry.image_id)
        if image is None:
            image = self._number_by_name(entry.image_id)
            if image is not None:
                log.add("named_by_file", where)
        if image is None:
            known = id_key(entry.image_id) is not None
            log.add("unknown_image" if known else "bad_annotation", where if known else f"annotations[{position}]")
            return
        row = images.row_of.get(image)
        if row is None:  # a listed image that cannot be used
            log.add("left_out_label", where)
            return
        category = categories.ids.find(entry.category_id)
        if category not in categories.names:
            log.add("unknown_category", f"{where}: category {str(entry.category_id)[:60]}")
            images.unclear.add(row)
            return
        raw = entry.to_dict()
        key = id_key(entry.id)
        is_repeated = key in self._repeated
        if is_repeated and self._first_of.setdefault(key, raw) is not raw:
            if self._first_of[key] == raw:
                log.add("duplicate_annotation", where)
                return
            log.add("duplicate_annotation_id", where)
            key = None
        if not isinstance(key, int) or not 0 <= key < _MAX_ID:
            self._largest_id = key = self._largest_id + 1
        try:
            clean = clean_annotation(raw, images.sizes_hw[row], log, where)
        except LabelError:
            images.unclear.add(row)
            return
        if clean is None:
            self._emptied.add((row, category))
            return
        if row in images.merged:
            content = (row, category, tuple(clean["bbox_xywh"]), clean["segmentation"])
            if content in self._seen_in_merged:
                log.add("duplicate_annotation", where)
                return
            self._seen_in_merged.add(content)
        mask = clean["segmentation"]
        text = None if mask is None else mask.encode()
        self._labels.add([row], [position], [key], [category], clean["bbox_xywh"], [clean["iscrowd"]], [text])

    def _number_by_name(self, reference: Any) -> int | None:
        """The number of the only image with this file name, with or without its suffix."""
        reference = id_key(reference)
        if not isinstance(reference, str):
            return None
        if self._numbers_by_name is None:
            self._numbers_by_name = {}
            for number, row in self._images.row_of.items():
                file_name = self._images.file_names[row]
                for name in {file_name, os.path.splitext(file_name)[0]}:
                    self._numbers_by_name.setdefault(name, set()).add(number)
        numbers = self._numbers_by_name.get(reference, set())
        return min(numbers) if len({self._images.row_of[number] for number in numbers}) == 1 else None


def _where(entry: AnnotationEntry, position: int) -> str:
    name = f"at position {position}" if entry.id is None else str(entry.id)[:60]
    return f"annotation {name} of image {str(entry.image_id)[:60]}"
