"""Where data sets keep their images and label files, and how a new folder is written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from PIL import ExifTags, Image

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage
from sam3lora.data.images import ImageError, read_size
from sam3lora.errors import UserError

WHOLE = "."  # a data set without splits
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
_ORDER = ("train", "valid", "test")


def split_name(folder: str) -> str:
    """What a split is called here.

    >>> split_name("Val"), split_name("train"), split_name("night")
    ('valid', 'train', 'night')
    """
    return {"val": "valid", "validation": "valid", "valid": "valid", "train": "train", "test": "test"}.get(
        folder.lower(), folder
    )


def subfolders(folder: Path) -> list[Path]:
    """Folders within, train, valid and test first.

    Raises:
        UserError: Two of them are the same split.
    """
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    order = {name: rank for rank, name in enumerate(_ORDER)}
    found.sort(key=lambda path: (order.get(split_name(path.name), len(order)), path.name))
    for first, second in pairwise(found):
        if split_name(first.name) == split_name(second.name):
            raise UserError(f"{first} and {second.name} would both be {split_name(first.name)}: join or rename them")
    return found


def list_images(folder: Path) -> list[Path]:
    """Image files directly in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def find_pairs(root: Path, labels: str) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of images, folder of labels, which may be missing).

    Known are `images/<split>` with `<labels>/<split>`, `<split>/images` with `<split>/<labels>`, and `images` with
    `<labels>` without splits.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    images = root / "images"
    if images.is_dir() and (root / labels).is_dir():
        if list_images(images):
            pairs[WHOLE] = (images, root / labels)
        for folder in subfolders(images):
            pairs[split_name(folder.name)] = (folder, root / labels / folder.name)
    for folder in subfolders(root):
        if (folder / "images").is_dir():
            pairs[split_name(folder.name)] = (folder / "images", folder / labels)
    return pairs


def open_image(path: Path, log: FaultLog) -> LabelledImage | None:
    """An image without objects yet, in the size at which labelling tools show it; None (counted) if unreadable."""
    try:
        height, width = read_size(path)
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (ImageError, OSError, ValueError, SyntaxError) as error:
        log.add("unreadable_image", str(error))
        return None
    if orientation in (2, 3, 4):
        log.add("turned_image", str(path))
    return LabelledImage(path, (width, height) if orientation in (5, 6, 7, 8) else (height, width))


@contextmanager
def new_folder(target: Path, source: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name at the end, whole, or not at all.

    Raises:
        UserError: `target` exists and holds something, or lies within `source`, which would then be read again.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: name a new folder, or remove this one first")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies within {source}, which is read: name a folder beside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir()
        yield scratch
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def place_images(images: list[LabelledImage], folder: Path, log: FaultLog) -> list[Path]:
    """Put the image files of a split into one folder, unchanged: as hard links, or as copies across file systems.

    Returns:
        The new files, in order; their names differ by more than suffix and case, so that label files can be named
        after them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    placed = []
    for image in images:
        stem, number = image.path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{image.path.stem}_{number}"
        if number > 1:
            log.add("renamed_image", f"{image.path} -> {stem}{image.path.suffix}")
        taken.add(stem.casefold())
        target = folder / f"{stem}{image.path.suffix}"
        _link(image.path.resolve(), target)
        placed.append(target)
    return placed


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
