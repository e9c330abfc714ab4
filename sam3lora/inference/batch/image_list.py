"""The images of a batch run: a folder, a list of paths, or a COCO file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sam3lora.data.coco import load_coco_json
from sam3lora.data.images import IMAGE_SUFFIXES
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import split_of_file
from sam3lora.errors import UserError


class ImageSource(NamedTuple):
    """One image to ask.

    ``path`` is absolute. ``name`` is relative to the folder that holds all images of the run: images with one base name
    in two folders differ in it. ``size_hw`` is the height and width that a COCO file gives, else None.
    """

    image_id: int
    path: str
    name: str
    size_hw: tuple[int, int] | None = None


def list_images(source: str | Path, *, leave_out: Path) -> tuple[list[ImageSource], dict[str, int]]:
    """The images, and the categories (name -> id) of a COCO file; there are none for a folder or a list.

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
    return [ImageSource(number, path, name) for number, (path, name) in enumerate(zip(paths, names), start=1)], {}


def choose_categories(prompts: Sequence[str], known: dict[str, int]) -> dict[str, int]:
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
    next_id = max(ids.values(), default=0) + 1
    chosen: dict[str, int] = {}
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


def _coco_images(source: Path) -> tuple[list[ImageSource], dict[str, int]]:
    split = split_of_file(source)
    index = split.read("skip")
    raw = load_coco_json(source)
    columns = (index.table.column(name).to_pylist() for name in ("image_id", "path", "height", "width"))
    known = {id_: (os.path.abspath(path), (height, width)) for id_, path, height, width in zip(*columns)}
    missing = [entry for entry in raw["images"] if isinstance(entry, dict) and entry.get("id") not in known]
    known |= {
        entry["id"]: (os.path.abspath(split.image_dir / entry["file_name"]), None)
        for entry in missing
        if isinstance(entry.get("id"), int) and isinstance(entry.get("file_name"), str)
    }
    names = _names([path for path, _ in known.values()])
    images = [ImageSource(id_, path, name, size) for (id_, (path, size)), name in zip(known.items(), names)]
    # Names may repeat: ids that annotations use come last and win.
    categories = {category["name"]: category["id"] for category in raw["categories"]}
    return images, categories | {name: id_ for id_, name in index.category_names.items()}


def common_folder(paths: Sequence[str]) -> str:
    """The folder that holds all images."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _names(paths: Sequence[str]) -> list[str]:
    root = common_folder(paths)
    return [Path(os.path.relpath(path, root)).as_posix() for path in paths]
