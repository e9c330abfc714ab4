"""The images of a batch run: a folder, a list of paths, or a COCO file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3lora.data.coco_file import CocoFile, read_coco_file
from sam3lora.data.fault_report import faults_as_reason, split_faults
from sam3lora.data.faults import FaultLog
from sam3lora.data.ids import IdKey, id_key
from sam3lora.data.image_files import ImageFiles
from sam3lora.data.images import IMAGE_SUFFIXES
from sam3lora.data.listed_entries import read_categories, read_images
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import split_of_file
from sam3lora.errors import UserError


class ImageSource(NamedTuple):
    """One image to ask.

    ``path`` is absolute. ``name`` is relative to the folder that holds all images of the run: images with one base name
    in two folders differ in it. ``size_hw`` is the height and width that a COCO file gives, else None.
    """

    image_id: IdKey
    path: str
    name: str
    size_hw: tuple[int, int] | None = None


class ImageList(NamedTuple):
    """The images of a run; of a COCO file also its categories (name -> id), and the faults that concern its images, as
    from `split_faults`. Its labels play no part."""

    images: list[ImageSource]
    categories: dict[str, IdKey]
    faults: list[dict[str, Any]]


def list_images(source: str | Path, *, leave_out: Path) -> ImageList:
    """The images of a folder, a list or a COCO file.

    Args:
        source: A folder (with its subfolders, hidden ones left out), a text file with a path a line, relative to that
            file, or a COCO JSON file, whose image ids are kept. Paths of the last two need not exist: what is missing
            is found out when it is read.
        leave_out: Folder that is not searched: the output, which may lie inside the input.

    Raises:
        UserError: No such folder or file, a file of another kind, or no image in it.
    """
    source = Path(os.path.abspath(Path(source).expanduser()))
    if source.is_file() and source.suffix.lower() == ".json":
        return _coco_images(source)
    if source.is_dir():
        paths = _walk(source, Path(os.path.abspath(leave_out)))
        expected = f"images ({' '.join(sorted(IMAGE_SUFFIXES))})"
    elif source.is_file() and source.suffix.lower() == ".txt":
        lines = source.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        paths = [os.path.abspath(source.parent / line.strip()) for line in lines if line.strip()]
        expected = "a path a line"
    else:
        raise UserError(f"no images at {source}: expected a folder, a list (.txt) or a COCO file (.json)")
    if not paths:
        raise UserError(f"{source} holds no images: expected {expected}")
    paths = list(dict.fromkeys(paths))
    names = _names(paths)
    images = [ImageSource(number, path, name) for number, (path, name) in enumerate(zip(paths, names), start=1)]
    return ImageList(images, {}, [])


def choose_categories(prompts: Sequence[str], known: Mapping[str, IdKey]) -> dict[str, IdKey]:
    """Prompt -> category id: that of the COCO file's category of this name, else the next free number from 1.

    Raises:
        UserError: No prompt, an empty one, or one given twice.

    >>> choose_categories(["gear", "Red  Bolt"], {"red bolt": 4})
    {'gear': 5, 'Red  Bolt': 4}
    """
    ids = {prompt_key(name): id_ for name, id_ in known.items()}
    keys = [prompt_key(prompt) for prompt in prompts]
    if not keys or "" in keys:
        raise UserError(f"expected one or more prompts that are not empty, got {list(prompts)}")
    if len(set(keys)) < len(keys):
        raise UserError(f"a prompt is given twice: {', '.join(prompts)}")
    next_id = max((key for key in map(id_key, ids.values()) if isinstance(key, int)), default=0) + 1
    chosen: dict[str, IdKey] = {}
    for prompt, key in zip(prompts, keys):
        if key not in ids:
            ids[key], next_id = next_id, next_id + 1
        chosen[prompt] = ids[key]
    return chosen


def _walk(root: Path, leave_out: Path) -> list[str]:
    found: list[str] = []
    seen = {os.path.realpath(leave_out)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:  # links may lead in a circle
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            os.path.join(folder, name)
            for name in sorted(files)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return found


def _coco_images(source: Path) -> ImageList:
    """The images that a COCO file lists, found as `CocoIndex` finds them. A file listed under two ids is asked once."""
    split = split_of_file(source)
    file, log = read_coco_file(source), FaultLog()
    found = read_images(file.images, ImageFiles(split.image_dir), log)
    faults = split_faults(source.name, log)
    if not found.row_of:
        raise UserError(f"{source}: none of its {len(file.images)} images can be used{faults_as_reason(faults)}")
    places: dict[IdKey, tuple[str, tuple[int, int] | None]] = {
        found.ids.written.get(number, number): (found.paths[row], found.sizes_hw[row])
        for row, number in enumerate(found.numbers)
    }
    missing: dict[IdKey, set[str]] = defaultdict(set)  # id -> names; an ambiguous id has several
    for entry in file.images:
        number = found.ids.find(entry.id)
        if number is not None and number not in found.row_of and isinstance(entry.file_name, str):
            missing[found.ids.written.get(number, number)].add(entry.file_name)
    places |= {id_: (str(split.image_dir / min(names)), None) for id_, names in missing.items() if len(names) == 1}
    paths = [os.path.abspath(path) for path, _ in places.values()]
    sizes = [size_hw for _, size_hw in places.values()]
    images = [ImageSource(*values) for values in zip(places, paths, _names(paths), sizes, strict=True)]
    return ImageList(images, _categories(file, source), faults)


def _categories(file: CocoFile, source: Path) -> dict[str, IdKey]:
    """Name -> id as the file writes it. Of several ids with one name one that annotations use counts."""
    listed = read_categories(file.categories, source, FaultLog())
    used = {listed.ids.find(annotation.category_id) for annotation in file.annotations}
    numbers = sorted(listed.names, key=lambda number: number in used)
    return {listed.names[number]: listed.ids.written.get(number, number) for number in numbers}


def common_folder(paths: Sequence[str]) -> str:
    """The folder that holds all images."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _names(paths: Sequence[str]) -> list[str]:
    root = common_folder(paths)
    return [Path(os.path.relpath(path, root)).as_posix() for path in paths]
