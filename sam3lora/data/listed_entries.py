"""The images and categories that an annotation file lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.data.coco_file import ImageEntry
from sam3lora.data.faults import FaultLog
from sam3lora.data.ids import IdTable, id_key
from sam3lora.data.image_files import ImageFiles
from sam3lora.data.images import MAX_MEGAPIXELS, ImageError, read_size
from sam3lora.data.prompts import plain_name, prompt_key
from sam3lora.errors import UserError


@dataclass
class ListedImages:
    """The listed images that can be used, by row; `row_of` is by the numbers of `ids`."""

    ids: IdTable
    numbers: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    sizes_hw: list[tuple[int, int]] = field(default_factory=list)
    row_of: dict[int, int] = field(default_factory=dict)
    unclear: set[int] = field(default_factory=set)
    """Rows of which it is not known what they show."""
    measured: list[str] = field(default_factory=list)
    """Files whose size was read, because the entry has none."""
    merged: set[int] = field(default_factory=set)
    """Rows of files that are listed several times."""

    def label(self, row: int) -> str:
        number = self.numbers[row]
        return f"image {self.ids.written.get(number, number)} {self.file_names[row]}"


@dataclass
class ListedCategories:
    """`names` is number -> name, one spelling for names that are the same prompt. Ids with two names are left out."""

    ids: IdTable
    names: dict[int, str] = field(default_factory=dict)


def read_images(entries: Sequence[ImageEntry], files: ImageFiles, log: FaultLog) -> ListedImages:
    """Find the files of the listed images and their sizes."""
    images = ListedImages(IdTable(entry.id for entry in entries))
    listed = _listed_images(entries, images, log)
    paths = files.find([str(entry.file_name) for _, entry in listed], log)
    row_of_path: dict[str, int] = {}
    for (number, entry), path in zip(listed, paths, strict=True):
        where = f"image {entry.id} {entry.file_name}"
        if path is None:
            log.add("missing_image", where)
            continue
        size_hw = _listed_size(entry)
        if size_hw is None:
            log.add("no_size", where)
            images.measured.append(path)
            size_hw = _measure(path, log, where)
        if size_hw is None:
            continue
        plain_path = os.path.normpath(path)  # "./a.jpg" is "a.jpg"
        if plain_path in row_of_path:
            row = row_of_path[plain_path]
            log.add("duplicate_file_name", f"{where} and {images.label(row)}")
            images.merged.add(row)
            images.ids.alias(number, images.numbers[row])
            if size_hw != images.sizes_hw[row]:
                images.unclear.add(row)
        else:
            row = row_of_path[plain_path] = len(images.numbers)
            images.numbers.append(number)
            images.paths.append(path)
            images.file_names.append(entry.file_name)
            images.sizes_hw.append(size_hw)
        images.row_of[number] = row
    return images


def _listed_images(entries: Sequence[ImageEntry], images: ListedImages, log: FaultLog) -> list[tuple[int, ImageEntry]]:
    """The entries with an id of their own and a file name, with the number of the id."""
    listed: dict[int, ImageEntry] = {}
    ambiguous: set[int] = set()
    for position, entry in enumerate(entries):
        name = entry.file_name
        if id_key(entry.id) is None or not isinstance(name, str) or not _is_text(name):
            log.add("bad_image_entry", f"images[{position}]")
            continue
        number = images.ids.add(entry.id)
        where = f"image {entry.id} {name}"
        if number is not None:
            listed[number] = entry
            continue
        number = images.ids.find(entry.id)
        assert number is not None
        if listed[number].file_name == name and _listed_size(listed[number]) == _listed_size(entry):
            log.add("duplicate_image_id", where)
        else:
            log.add(
                "ambiguous_image_id", f"{where} and {listed[number].file_name}", count=1 if number in ambiguous else 2
            )
            ambiguous.add(number)
    return [(number, entry) for number, entry in listed.items() if number not in ambiguous]


def _is_text(name: str) -> bool:
    """Whether a name can be that of a file."""
    try:
        return bool(name.strip()) and b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _listed_size(entry: ImageEntry) -> tuple[int, int] | None:
    """(height, width) of an entry; None if it has none that an image can have."""
    height, width = (id_key(value) for value in (entry.height, entry.width))
    if isinstance(height, int) and isinstance(width, int) and 0 < height * width <= MAX_MEGAPIXELS * 1e6 and height > 0:
        return height, width
    return None


def _measure(path: str, log: FaultLog, where: str) -> tuple[int, int] | None:
    """(height, width) as the image's header says."""
    try:
        return read_size(path)
    except ImageError:
        log.add("unreadable_image", where)
        return None


def read_categories(entries: Sequence[Any], source: Path, log: FaultLog) -> ListedCategories:
    """The listed categories.

    Raises:
        UserError: One has no id or no name.
    """
    categories = ListedCategories(IdTable(entry.get("id") for entry in entries if isinstance(entry, dict)))
    spelling: dict[str, str] = {}
    ambiguous: set[int] = set()
    for entry in entries:
        listed, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if id_key(listed) is None or not isinstance(name, str) or not plain_name(name):
            raise UserError(f"{source}: a category needs an id and a name, got {str(entry)[:200]}")
        plain = plain_name(name)
        if plain != name.strip():
            log.add("unprintable_name", f"id {listed}: {plain!r}")
        name = spelling.setdefault(prompt_key(plain), plain)
        number = categories.ids.add(listed)
        if number is not None:
            categories.names[number] = name
            continue
        number = categories.ids.find(listed)
        assert number is not None
        if categories.names[number] != name:
            log.add("ambiguous_category_id", f"id {listed}: {categories.names[number]!r} and {name!r}")
            ambiguous.add(number)
    for number in ambiguous:
        del categories.names[number]
    return categories
