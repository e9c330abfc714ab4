"""Folder layouts of data sets: finding images and label files, and writing a new folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from sam3lora.data.convert.labelled_set import LabelledImage
from sam3lora.data.faults import FaultLog
from sam3lora.data.images import IMAGE_SUFFIXES, ImageError, read_size
from sam3lora.data.split_files import WHOLE, split_name, subfolders
from sam3lora.errors import UserError
from sam3lora.files import whole_folder


def distinct_subfolders(folder: Path) -> list[Path]:
    """Subfolders, with train, valid and test first.

    Raises:
        UserError: Two of them are the same split, as `val` and `valid` are.
    """
    found = subfolders(folder)
    check_distinct(found, [path.name for path in found])
    return found


def check_distinct(paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raise UserError if two names are the same split; `paths` says where each is."""
    seen: dict[str, Path] = {}
    for path, name in zip(paths, map(split_name, names), strict=True):
        if name in seen:
            raise UserError(f"{seen[name]} and {path} would both be {name}: join or rename them")
        seen[name] = path


def split_folders(source: Path, suffix: str) -> dict[str, Path]:
    """Split -> folder with label files of this suffix: `source` itself, or a subfolder with all folders in it."""
    folders = {split_name(folder.name): folder for folder in distinct_subfolders(source)}
    splits = {split: folder for split, folder in folders.items() if find_files(folder, [suffix])}
    return ({WHOLE: source} if find_files(source, [suffix], nested=False) else {}) | splits


def find_files(folder: Path, suffixes: Collection[str], *, nested: bool = True) -> list[Path]:
    """Files with these lower-case suffixes in a folder and, if `nested`, in all folders within it; no hidden ones."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if nested and not name.startswith("."))
        if os.path.realpath(place) in seen:  # links may lead in a circle
            inner.clear()
            continue
        seen.add(os.path.realpath(place))
        found += (Path(place, name) for name in sorted(names) if not name.startswith("."))
    return [path for path in found if path.suffix.lower() in suffixes]


def image_files(folder: Path, *, nested: bool = True) -> list[Path]:
    """Image files in a folder and, if `nested`, in all folders within it."""
    return find_files(folder, IMAGE_SUFFIXES, nested=nested)


def key_in(folder: Path, path: Path) -> str:
    """What a file and its partner of another suffix share: the place in their folders and the name.

    >>> key_in(Path("images"), Path("images/cam1/0.jpg"))
    'cam1/0'
    """
    return path.relative_to(folder).with_suffix("").as_posix()


def find_pairs(root: Path, labels: str) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of images, folder of labels, which may be missing).

    Three layouts are known: `images/<split>` with `<labels>/<split>`, `<split>/images` with `<split>/<labels>`, and
    `images` with `<labels>` for a data set without splits, whose files lie directly there. The files of a split may lie
    in further folders, the same ones on both sides.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    images = root / "images"
    if images.is_dir() and (root / labels).is_dir():
        pairs = splits_within(images, root / labels)
    for folder in distinct_subfolders(root):
        if (folder / "images").is_dir():
            split = split_name(folder.name)
            if split in pairs:
                raise UserError(f"{pairs[split][0]} and {folder} would both be {split}: join or rename them")
            pairs[split] = (folder / "images", folder / labels)
    return pairs


def splits_within(images: Path, labels: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of images, folder of labels) of folders that hold those of splits, or files directly."""
    whole = {WHOLE: (images, labels)} if image_files(images, nested=False) else {}
    return whole | {split_name(path.name): (path, labels / path.name) for path in distinct_subfolders(images)}


def open_image(path: Path, log: FaultLog) -> LabelledImage | None:
    """An image without objects, in the size at which labelling tools show it; None (and counted) if unreadable."""
    try:
        height, width = read_size(path)
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (ImageError, OSError, ValueError, SyntaxError) as error:
        log.add("broken_source_image", str(error))
        return None
    if orientation in (2, 3, 4):
        log.add("turned_image", str(path))
    return LabelledImage(path, (width, height) if orientation in (5, 6, 7, 8) else (height, width))


@contextmanager
def new_folder(target: Path, source: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends without an error; see `whole_folder`.

    Raises:
        UserError: `target` exists and is not empty, or lies within `source`, where it would be read as input.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: name a new folder, or remove this one first")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies within {source}, the input: name a folder outside it")
    with whole_folder(target) as folder:
        yield folder


def place_images(images: list[LabelledImage], folder: Path, log: FaultLog) -> list[Path]:
    """Put the image files of a split into one folder, unchanged: as hard links, or as copies across file systems.

    Returns:
        The new files, in order. Their names differ by more than suffix and case, so that label files can be named after
        them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    placed = []
    for image in images:
        own = image.path.stem.encode(errors="surrogateescape").decode(errors="replace")  # a name that is text
        stem, number = own, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{own}_{number}"
        if stem != image.path.stem:
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
