"""Parsing a COCO annotation file: its three lists, with boxes and masks left as text until they are looked at.

A file of COCO's size holds tens of millions of numbers. As Python objects they take ten times the memory of their text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sam3lora.errors import UserError

_MAX_DIGITS = 1000  # of an integer
LISTS = ("images", "annotations", "categories")


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of `images` as it is written; None for what it lacks."""

    id: Any = None
    file_name: Any = None
    width: Any = None
    height: Any = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """An entry of `annotations` as it is written. `bbox` and `segmentation` are JSON text, empty if it lacks them."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    iscrowd: Any = 0
    bbox: msgspec.Raw = msgspec.Raw(b"")
    segmentation: msgspec.Raw = msgspec.Raw(b"")

    def to_dict(self) -> dict[str, Any]:
        """All values parsed."""
        values = {name: getattr(self, name) for name in ("id", "image_id", "category_id", "iscrowd")}
        return values | {"bbox": parse_text(self.bbox), "segmentation": parse_text(self.segmentation)}


class CocoFile(msgspec.Struct):
    """The lists of a file. An entry that is not an object has None everywhere."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[Any]


class _ImagesOnly(msgspec.Struct):
    images: list[msgspec.Raw]


class _CategoriesOnly(msgspec.Struct):
    categories: list[Any]


def read_coco_file(source: Path) -> CocoFile:
    """Parse an annotation file.

    Raises:
        UserError: The file is missing, truncated or not COCO. If missing, the message lists the JSON files there.
    """
    data = _read_bytes(source)
    _refuse_repeated_lists(source, data)
    try:
        return msgspec.json.decode(data, type=CocoFile)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _parse_leniently(source, data)


def count_listed_images(source: Path) -> int:
    """Number of entries of `images`. Raises UserError as `read_coco_file` does."""
    try:
        return len(msgspec.json.decode(_read_bytes(source), type=_ImagesOnly).images)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return len(read_coco_file(source).images)


def read_category_entries(source: Path) -> list[Any]:
    """The entries of `categories` as they are written. Raises UserError as `read_coco_file` does."""
    try:
        return msgspec.json.decode(_read_bytes(source), type=_CategoriesOnly).categories
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return read_coco_file(source).categories


def parse_json(source: Path, data: bytes) -> Any:
    """Any JSON value, also with NaN and numbers of any length, which strict parsers refuse.

    Raises:
        UserError: It is not JSON in UTF-8, or nested thousands of lists deep.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=_parse_integer)
    except RecursionError:
        raise UserError(f"{source} is nested too deeply to be an annotation file") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON ({error}); is the file truncated? Export it again") from None


def _read_bytes(source: Path) -> bytes:
    if not source.parent.is_dir():
        raise UserError(f"no folder {source.parent}; expected a split folder that holds {source.name} and its images")
    if not source.is_file():
        found = sorted(p.name for p in source.parent.glob("*.json"))[:5]
        hint = f"found {', '.join(found)}: set data.annotation_file" if found else "found no JSON file there"
        raise UserError(f"no annotation file {source}; {hint}")
    try:
        return source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None


def load_coco_json(source: Path) -> dict[str, Any]:
    """All of a small annotation file as Python objects. Raises UserError as `read_coco_file` does."""
    return _parse_to_objects(source, _read_bytes(source))


def _parse_to_objects(source: Path, data: bytes) -> dict[str, Any]:
    raw = parse_json(source, data)
    missing = [key for key in LISTS if not isinstance(raw, dict) or not isinstance(raw.get(key), list)]
    if missing:
        raise UserError(f"{source} is not a COCO file: expected lists {', '.join(LISTS)}, without {', '.join(missing)}")
    return raw


def _parse_leniently(source: Path, data: bytes) -> CocoFile:
    """What Python's own parser makes of a file: with NaN, numbers of any size, and entries that are not objects."""
    raw = _parse_to_objects(source, data)
    return CocoFile(
        [ImageEntry(**_fields(entry, ImageEntry)) for entry in raw["images"]],
        [_annotation_entry(entry) for entry in raw["annotations"]],
        raw["categories"],
    )


def _annotation_entry(entry: Any) -> AnnotationEntry:
    values = _fields(entry, AnnotationEntry)
    texts = {
        name: msgspec.Raw(json.dumps(values[name]).encode()) for name in ("bbox", "segmentation") if name in values
    }
    return AnnotationEntry(**values | texts)


def _fields(entry: Any, kind: type[msgspec.Struct]) -> dict[str, Any]:
    names: Sequence[str] = kind.__struct_fields__
    return {name: entry[name] for name in names if name in entry} if isinstance(entry, dict) else {}


def parse_text(text: msgspec.Raw) -> Any:
    """The value of a text that was left; a str, which is neither a box nor a mask, if it cannot be parsed."""
    data = bytes(text)
    try:
        return json.loads(data, parse_int=_parse_integer) if data else None
    except (ValueError, RecursionError):
        return "unreadable"


def _parse_integer(text: str) -> int | str:
    """Python converts thousands of digits only if asked to, as it takes long."""
    return int(text) if len(text) <= _MAX_DIGITS else text


def _refuse_repeated_lists(source: Path, data: bytes) -> None:
    """Parsers take the last of two lists with one name, and drop the other without a word."""
    if all(data.count(f'"{name}"'.encode()) < 2 for name in LISTS):
        return
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names[:] = [name for name, _ in pairs]  # in the end those of the outermost object
        return dict(pairs)

    try:
        json.loads(data, object_pairs_hook=note, parse_int=_parse_integer)
    except (ValueError, RecursionError):
        return  # told by the parser
    if repeated := [name for name in LISTS if names.count(name) > 1]:
        raise UserError(f"{source} has the list {repeated[0]!r} twice: join the two, or export the file again")
