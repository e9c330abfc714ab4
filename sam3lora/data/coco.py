"""A COCO instance-segmentation folder as an index of light records.

The index holds image paths and cleaned annotations, no pixels. `CocoIndex.faults` counts every fault found while
reading, with what was done about it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sam3lora.data import index_cache
from sam3lora.data.bad_images import WITHOUT_THEM
from sam3lora.data.coco_file import read_coco_file
from sam3lora.data.faults import NOTE, FaultLog
from sam3lora.data.ids import IdTable
from sam3lora.data.image_files import ImageFiles
from sam3lora.data.images import ImageError
from sam3lora.data.index_columns import keep_annotations, object_columns
from sam3lora.data.label_table import LabelTable
from sam3lora.data.listed_entries import read_categories, read_images
from sam3lora.data.prompts import prompt_key
from sam3lora.data.void import VOID
from sam3lora.errors import UserError
from sam3lora.garbage_collection import no_garbage_collection

ANNOTATION_FILE = "_annotations.coco.json"


@dataclass(frozen=True)
class CocoIndex:
    """Images and annotations of one split. Boxes and polygons are in pixels of `width` x `height`."""

    table: pa.Table  # one row per image, with SCHEMA
    category_names: dict[int, str]  # of the ids that annotations use
    faults: FaultLog = field(default_factory=FaultLog)
    source: str = ""  # the annotation file
    image_ids: IdTable = field(default_factory=IdTable, repr=False)  # of all listed images, also those left out
    category_ids: IdTable = field(default_factory=IdTable, repr=False)
    listed_names: dict[int, str] = field(default_factory=dict, repr=False)  # by the numbers of `category_ids`

    @classmethod
    def from_folder(
        cls,
        split_dir: str | Path,
        annotation_file: str = ANNOTATION_FILE,
        *,
        image_dir: str | Path | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
        allow_empty: bool = False,
    ) -> CocoIndex:
        """Read `split_dir/annotation_file`, whose file names are relative to `image_dir` (None: the file's own folder).

        Listed images that do not exist raise with `on_bad_image` "stop"; "skip" counts them and leaves them out. An
        image with a label that cannot be read is left out and counted: what it shows is not known.

        The index of a large file is kept, and mapped by later calls of any process (`sam3lora.data.index_cache`).

        Raises:
            UserError: No such folder or file, truncated JSON, not COCO, or no usable image (unless `allow_empty`).
            ImageError: A listed image is missing and `on_bad_image` is "stop".
        """
        source = Path(split_dir) / annotation_file
        folder = (source.parent if image_dir is None else Path(image_dir)).absolute()  # a kept index is read anywhere
        with index_cache.kept_index(source, folder) as kept:
            index = _restore(kept, source)
            if index is None:
                with no_garbage_collection():
                    index = _read_index(source, folder, kept)
        _stop_on_missing(index.faults, source, on_bad_image)
        if not len(index) and not allow_empty:
            why = "; ".join(str(fault) for fault in index.faults if fault.level != NOTE) or "the list is empty"
            raise UserError(f"{source}: none of its {len(index.image_ids)} images can be used ({why})")
        return index

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct names of the categories in use, by ascending id; without one that only marks void regions."""
        return tuple(dict.fromkeys(self.category_names.values()))

    def written_id(self, image_id: int) -> Any:
        """The id of an image as the annotation file writes it."""
        return self.image_ids.written.get(image_id, image_id)

    def record(self, row: int) -> dict[str, Any]:
        return read_record(self.table, row)

    def select_categories(self, names: Sequence[str]) -> CocoIndex:
        """Keep only these categories, by name, and void regions. All images stay: those without the categories become
        negatives.

        Raises:
            UserError: No annotation has one of the names; the message suggests the nearest one.
        """
        by_key = {prompt_key(name): name for name in self.names}
        for name in names:
            if prompt_key(name) not in by_key:
                near = difflib.get_close_matches(name, self.names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{self.source}: no annotated category {name!r}; it has {', '.join(self.names)}{hint}")
        kept = {by_key[prompt_key(name)] for name in names}
        objects = object_columns(self.table)
        is_kept = np.array([name in kept for name in objects.categories], dtype=bool)
        table = keep_annotations(self.table, is_kept[objects.codes_T] | objects.void_T)
        ids = {id_: name for id_, name in self.category_names.items() if name in kept}
        return dataclasses.replace(self, table=table, category_names=ids)

    def select_rows(self, rows: Sequence[int]) -> CocoIndex:
        """Keep only the images of these rows, in this order."""
        if len(rows) == len(self) and all(row == place for place, row in enumerate(rows)):
            return self
        return dataclasses.replace(self, table=self.table.take(pa.array(rows, type=pa.int64())))

    def first(self, number: int | None) -> CocoIndex:
        """Keep only the first so many images; None keeps all."""
        return self if number is None else self.select_rows(range(min(number, len(self))))


def read_record(table: pa.Table, row: int) -> dict[str, Any]:
    """One row of an index table as plain Python values."""
    return table.slice(row, 1).to_pylist()[0]


def merge_names(indexes: Iterable[CocoIndex]) -> tuple[str, ...]:
    """Category names of several splits: a category seen only in training is still a true negative in validation."""
    names: dict[str, str] = {}
    for index in indexes:
        for name in index.names:
            names.setdefault(prompt_key(name), name)
    return tuple(names.values())


def _read_index(source: Path, folder: Path, kept: index_cache.KeptIndex) -> CocoIndex:
    log = FaultLog()
    file = read_coco_file(source)
    files = ImageFiles(folder)
    images = read_images(file.images, files, log)
    categories = read_categories(file.categories, source, log)
    labels = LabelTable(images, categories, log)
    labels.add(file.annotations)
    del file  # the labels have copied what they need of its text
    table, used = labels.finish()
    _report_categories(categories.names, used, log)
    names = {number: categories.names[number] for number in sorted(used)}
    if any(prompt_key(name) == VOID for name in names.values()):
        counts = object_columns(table).count_per_category()
        names = {number: name for number, name in names.items() if name in counts}
    index = CocoIndex(table, names, log, str(source), images.ids, categories.ids, categories.names)
    kept.save(table, _facts(index), files, images.measured)
    return index


def _facts(index: CocoIndex) -> dict[str, Any]:
    """What an index holds beside its table, as JSON values."""
    return {
        "category_names": list(index.category_names.items()),
        "listed_names": list(index.listed_names.items()),
        "faults": [[fault.kind, fault.count, fault.examples] for fault in index.faults],
        "image_ids": index.image_ids.to_json(),
        "category_ids": index.category_ids.to_json(),
    }


def _restore(kept: index_cache.KeptIndex, source: Path) -> CocoIndex | None:
    """The kept index; None if there is none, or a damaged one."""
    if kept.table is None:
        return None
    log = FaultLog()
    try:
        for kind, count, examples in kept.facts["faults"]:
            log.add(kind, *examples, count=count)
        return CocoIndex(
            kept.table,
            dict(kept.facts["category_names"]),
            log,
            str(source),
            IdTable.from_json(kept.facts["image_ids"]),
            IdTable.from_json(kept.facts["category_ids"]),
            dict(kept.facts["listed_names"]),
        )
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


def _stop_on_missing(log: FaultLog, source: Path, on_bad_image: str) -> None:
    missing = log.count("missing_image")
    if missing and on_bad_image == "stop":
        raise ImageError(
            f"{source}: {missing} listed image(s) not found, e.g. {'; '.join(log.examples('missing_image'))}. "
            f"Restore them, take them out of the file, or {WITHOUT_THEM}"
        )


def _report_categories(names: Mapping[int, str], used: set[int], log: FaultLog) -> None:
    ids_by_name: dict[str, list[int]] = {}
    for category_id, name in names.items():
        ids_by_name.setdefault(name, []).append(category_id)
        if category_id not in used:
            log.add("unused_category", f"id {category_id} {name!r}")
    for name, ids in ids_by_name.items():
        if len(ids) > 1:
            log.add("duplicate_category_name", f"{name!r}: ids {', '.join(map(str, ids))}")
