"""A COCO instance-segmentation folder as an index of light records.

The index holds image paths and cleaned annotations, no pixels. `CocoIndex.faults` counts every fault found while
reading, with what was done about it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sam3lora.data.annotations import clean_annotation
from sam3lora.data.faults import FaultLog
from sam3lora.data.images import ImageError, read_size
from sam3lora.data.prompts import prompt_key
from sam3lora.errors import UserError

ANNOTATION_FILE = "_annotations.coco.json"

_ANNOTATION = pa.struct(
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
        ("annotations", pa.list_(_ANNOTATION)),
    ]
)


@dataclass(frozen=True)
class CocoIndex:
    """Images and annotations of one split. Boxes and polygons are in pixels of `width` x `height`."""

    table: pa.Table  # one row per image, with SCHEMA
    category_names: dict[int, str]  # of the ids that annotations use
    faults: FaultLog = field(default_factory=FaultLog)
    source: str = ""  # the annotation file

    @classmethod
    def from_folder(
        cls,
        split_dir: str | Path,
        annotation_file: str = ANNOTATION_FILE,
        *,
        image_dir: str | Path | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> CocoIndex:
        """Read `split_dir/annotation_file`, whose file names are relative to `image_dir` (None: the file's own folder).

        Listed images that do not exist raise with `on_bad_image` "stop"; "skip" counts them and leaves them out.

        Raises:
            UserError: No such folder or file, truncated JSON, not COCO, or no usable image.
            ImageError: A listed image is missing and `on_bad_image` is "stop".
        """
        source = Path(split_dir) / annotation_file
        raw = load_coco_json(source)
        log = FaultLog()
        folder = source.parent if image_dir is None else Path(image_dir)
        images = _read_images(raw["images"], folder, log)
        _stop_on_missing(log, source, on_bad_image)
        if not images:
            why = "; ".join(map(str, log)) or "the list is empty"
            raise UserError(f"{source}: none of its {len(raw['images'])} images can be used ({why})")
        names = _read_categories(raw["categories"], source)
        listed = {_integer(entry.get("id")) for entry in raw["images"] if isinstance(entry, dict)}
        used = _attach_annotations(raw["annotations"], images, listed, names, log)
        _report_categories(raw["categories"], names, used, log)
        columns = {name: [image[name] for image in images.values()] for name in SCHEMA.names}
        table = pa.table(columns, schema=SCHEMA)
        return cls(table, {id_: names[id_] for id_ in sorted(used)}, log, str(source))

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct names of the categories in use, by ascending id."""
        return tuple(dict.fromkeys(self.category_names.values()))

    def record(self, row: int) -> dict[str, Any]:
        return read_record(self.table, row)

    def select_categories(self, names: Sequence[str]) -> CocoIndex:
        """Keep only these categories, by name. All images stay: those without the categories become negatives.

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
        records = self.table.to_pylist()
        for record in records:
            record["annotations"] = [a for a in record["annotations"] if a["category"] in kept]
        ids = {id_: name for id_, name in self.category_names.items() if name in kept}
        return dataclasses.replace(self, table=pa.Table.from_pylist(records, schema=SCHEMA), category_names=ids)

    def select_rows(self, rows: Sequence[int]) -> CocoIndex:
        """Keep only the images of these rows, in this order."""
        return dataclasses.replace(self, table=self.table.take(pa.array(rows, type=pa.int64())))


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


def load_coco_json(source: Path) -> dict[str, Any]:
    """Parse an annotation file.

    Raises:
        UserError: The file is missing, truncated or not COCO. If missing, the message lists the JSON files there.
    """
    if not source.parent.is_dir():
        raise UserError(f"no folder {source.parent}; expected a split folder that holds {source.name} and its images")
    if not source.is_file():
        found = sorted(p.name for p in source.parent.glob("*.json"))[:5]
        hint = f"found {', '.join(found)}: set data.annotation_file" if found else "found no JSON file there"
        raise UserError(f"no annotation file {source}; {hint}")
    try:
        raw = json.loads(source.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is not valid JSON ({error}); is the file truncated? Export it again") from None
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(raw, dict) or not isinstance(raw.get(key), list)]
    if missing:
        raise UserError(f"{source} is not a COCO file: expected lists {', '.join(keys)}, without {', '.join(missing)}")
    return raw


def _read_images(entries: list[Any], folder: Path, log: FaultLog) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    seen_names: set[str] = set()
    for position, entry in enumerate(entries):
        image_id = _integer(entry.get("id")) if isinstance(entry, dict) else None
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        if image_id is None or not isinstance(file_name, str) or not file_name:
            log.add("bad_image_entry", f"images[{position}]")
            continue
        where = f"image {image_id} {file_name}"
        if image_id in images:
            log.add("duplicate_image_id", where)
            continue
        path = _find_image(folder, file_name)
        if path is None:
            log.add("missing_image", where)
            continue
        height, width = _integer(entry.get("height")), _integer(entry.get("width"))
        if not height or not width or height < 0 or width < 0:
            log.add("no_size", where)
            try:
                height, width = read_size(path)
            except ImageError:
                log.add("unreadable_image", where)
                continue
        if file_name in seen_names:
            log.add("duplicate_file_name", where)
        seen_names.add(file_name)
        images[image_id] = {
            "image_id": image_id,
            "path": str(path),
            "file_name": file_name,
            "width": width,
            "height": height,
            "annotations": [],
        }
    return images


def _find_image(folder: Path, file_name: str) -> Path | None:
    name = file_name.replace("\\", "/")
    for candidate in (folder / name, folder / Path(name).name, folder / "images" / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def _stop_on_missing(log: FaultLog, source: Path, on_bad_image: str) -> None:
    missing = log.count("missing_image")
    if missing and on_bad_image == "stop":
        raise ImageError(
            f"{source}: {missing} listed image(s) not found, e.g. {'; '.join(log.examples('missing_image'))}. "
            "Restore them, or take them out of the file (training goes on without them with training.on_bad_image=skip)"
        )


def _read_categories(entries: list[Any], source: Path) -> dict[int, str]:
    """Category id -> name, with one spelling for names that are the same prompt."""
    names: dict[int, str] = {}
    spelling: dict[str, str] = {}
    for entry in entries:
        category_id = _integer(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if category_id is None or not isinstance(name, str) or not name.strip():
            raise UserError(f"{source}: a category needs an integer id and a name, got {entry!r}")
        names[category_id] = spelling.setdefault(prompt_key(name), name.strip())
    return names


def _attach_annotations(
    entries: list[Any], images: dict[int, dict[str, Any]], listed: set[int | None], names: dict[int, str], log: FaultLog
) -> set[int]:
    """Add cleaned annotations to their images; returns the category ids in use.

    `listed` holds the ids of all image entries, `images` only those of usable images.
    """
    used: set[int] = set()
    seen: dict[int, Any] = {}
    largest_id = max((_integer(e.get("id")) or 0 for e in entries if isinstance(e, dict)), default=0)
    for position, raw in enumerate(entries):
        ids = [_integer(raw.get(key)) for key in ("image_id", "category_id")] if isinstance(raw, dict) else [None]
        if None in ids:
            log.add("bad_annotation", f"annotations[{position}]")
            continue
        image_id, category_id = ids
        annotation_id = _integer(raw.get("id"))
        where = f"annotation {raw.get('id', f'at position {position}')} of image {image_id}"
        if image_id not in images:
            if image_id not in listed:  # a listed image that was left out is already counted
                log.add("unknown_image", where)
            continue
        if category_id not in names:
            log.add("unknown_category", f"{where}: category {category_id}")
            continue
        if annotation_id in seen and seen[annotation_id] == raw:
            log.add("duplicate_annotation", where)
            continue
        if annotation_id in seen:
            log.add("duplicate_annotation_id", where)
        if annotation_id is None or annotation_id in seen:
            largest_id += 1
            annotation_id = largest_id
        seen[annotation_id] = raw
        image = images[image_id]
        clean = clean_annotation(raw, (image["height"], image["width"]), log, where)
        if clean is None:
            continue
        used.add(category_id)
        image["annotations"].append(
            {"id": annotation_id, "category_id": category_id, "category": names[category_id], **clean}
        )
    return used


def _report_categories(entries: list[Any], names: dict[int, str], used: set[int], log: FaultLog) -> None:
    ids_by_name: dict[str, list[int]] = {}
    for category_id, name in names.items():
        ids_by_name.setdefault(name, []).append(category_id)
        if category_id not in used:
            log.add("unused_category", f"id {category_id} {name!r}")
    for name, ids in ids_by_name.items():
        if len(ids) > 1:
            log.add("duplicate_category_name", f"{name!r}: ids {', '.join(map(str, ids))}")


def _integer(value: Any) -> int | None:
    """An id or a size as int. Whole floats and strings of digits are accepted; anything else becomes None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return None
