"""Which images and label files a YOLO data set has, as its `data.yaml` says, or by its folders.

Where `data.yaml` names a split, that is a folder of images, a text file with a path a line, or a list of these,
relative to its `path` or to itself. The label file of `.../images/a/0.jpg` is `.../labels/a/0.txt`, as Ultralytics has
it: https://docs.ultralytics.com/datasets/segment/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from sam3lora.data.convert.layout import find_files, find_pairs, image_files
from sam3lora.data.faults import FaultLog
from sam3lora.data.split_files import WHOLE, split_name
from sam3lora.errors import UserError

Labels = dict[Path, Path]  # image -> label file, which may be missing

_SPLIT_KEYS = ("train", "val", "valid", "validation", "test")


def read_description(source: Path) -> tuple[Path, dict[str, Any]]:
    """`data.yaml`, or else the first other YAML file with names or splits, and its content, which may be empty.

    Raises:
        UserError: A file is not valid YAML, or describes key points.
    """
    for path in sorted([*source.glob("*.yaml"), *source.glob("*.yml")], key=lambda p: (p.stem != "data", p.name)):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not valid YAML: {str(error)[:200]}") from None
        if not isinstance(content, dict):
            continue
        if content.get("kpt_shape"):
            raise UserError(
                f"{path} has kpt_shape: its labels are boxes with key points (a pose data set), which are no masks. "
                "Convert a data set of segments or boxes; for the boxes alone, keep five numbers a line and remove "
                "kpt_shape"
            )
        if any(content.get(key) for key in ("names", *_SPLIT_KEYS)):
            return path, content
    return source / "data.yaml", {}


def find_label_files(
    source: Path, description_file: Path, description: Mapping[str, Any], log: FaultLog
) -> dict[str, Labels]:
    """Split -> images with their label files. What is left out is counted: label files without an image, too."""
    splits, missing = _described_splits(source, description_file, description, log)
    listed = set(chain.from_iterable(splits.values()))
    label_folders = {folder for found in splits.values() for label in found.values() if (folder := _top_folder(label))}
    expected = set(chain.from_iterable(found.values() for found in splits.values()))
    for split, (images, labels) in find_pairs(_absolute(source), "labels").items():
        found = {
            path: _existing(labels / path.relative_to(images).with_suffix(".txt"))
            for path in image_files(images, nested=split != WHOLE)
        }
        expected.update(found.values())
        label_folders.add(labels)
        others = {path: label for path, label in found.items() if path not in listed}
        if len(others) < len(found) or split in splits:
            for path in others:
                log.add("unlisted_image", str(path))
        elif others:
            splits[split] = others
    for split, found in list(splits.items()):
        if not any(label.parent.is_dir() for label in found.values()):
            log.add("unlabelled_split", f"{split}: {len(found)} images, no folder {next(iter(found.values())).parent}")
            del splits[split]
    for split, text in missing.items():
        if split not in splits:
            log.add("missing_split", text)
    for path in sorted({path for folder in label_folders for path in find_files(folder, [".txt"])} - expected):
        if path.stem != "classes":
            log.add("label_without_image", str(path))
    return splits


def has_labels(source: Path) -> bool:
    """Whether a folder holds YOLO label files."""
    folders = [labels for _, labels in find_pairs(source, "labels").values()]
    if any(find_files(folder, [".txt"]) for folder in folders):
        return True
    try:
        splits, _ = _described_splits(source, *read_description(source), FaultLog())
    except UserError:  # a YAML file of something else
        return False
    return any(label.is_file() for found in splits.values() for label in found.values())


def _described_splits(
    source: Path, description_file: Path, description: Mapping[str, Any], log: FaultLog
) -> tuple[dict[str, Labels], dict[str, str]]:
    """The splits that `data.yaml` names, and a text for each one that is not there."""
    splits: dict[str, Labels] = {}
    missing: dict[str, str] = {}
    repeated = []
    for key in (key for key in _SPLIT_KEYS if description.get(key)):
        entries = description[key] if isinstance(description[key], list) else [description[key]]
        places = {str(entry)[:100]: _place(description_file, description, entry) for entry in entries}
        missing |= {
            split_name(key): f"{description_file}: {key}: {entry}" for entry, place in places.items() if place is None
        }
        images = chain.from_iterable(_images_at(place, source, log) for place in places.values() if place)
        found = {path: _label_file(path) for path in images}
        if any(found.keys() == other.keys() for other in splits.values()):
            repeated.append(f"{description_file}: {key}")
        elif found:
            splits[split_name(key)] = splits.get(split_name(key), {}) | found
    if len(splits) == 1 and repeated:  # Ultralytics demands train and val even of a set that has no splits
        return {WHOLE: next(iter(splits.values()))}, missing
    for text in repeated:
        log.add("repeated_split", text)
    return splits, missing


def _place(description_file: Path, description: Mapping[str, Any], entry: Any) -> Path | None:
    """The folder or list that an entry names; in the data set itself before elsewhere."""
    if not isinstance(entry, str):
        return None
    home, root = description_file.parent, str(description.get("path") or "")
    inside = entry
    while inside.startswith(("../", "./")):  # Roboflow writes ../train/images for train/images
        inside = inside.partition("/")[2]
    for place in (home / inside, home / root / inside, home / root / entry, home / entry):
        if os.path.exists(place):
            return _absolute(place)
    return None


def _images_at(place: Path, source: Path, log: FaultLog) -> Iterator[Path]:
    if place.is_dir():
        yield from image_files(place)
        return
    for line in place.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
        name = line.strip()
        if not name:
            continue
        path = next((path for path in (place.parent / name, source / name) if os.path.isfile(path)), None)
        if path is None:
            log.add("missing_image", f"{name}, listed in {place}")
        else:
            yield _absolute(path)


def _label_file(image: Path) -> Path:
    label = image.with_suffix(".txt")
    folder = next((folder for folder in image.parents if folder.name == "images"), None)
    return _existing(folder.with_name("labels") / label.relative_to(folder) if folder else label)


def _existing(label_file: Path) -> Path:
    """The label file, with its suffix in capital letters if that is the one that exists."""
    capital = label_file.with_suffix(".TXT")
    return _absolute(capital if capital.is_file() and not label_file.is_file() else label_file)


def _top_folder(label_file: Path) -> Path | None:
    """The folder `labels` that holds a label file; None for one that lies beside its image."""
    return next((folder for folder in label_file.parents if folder.name == "labels"), None)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
