"""Reading and writing YOLO boxes and polygons: one text file per image, one line per object.

A line is `class cx cy w h` (a box) or `class x0 y0 x1 y1 x2 y2 ...` (a polygon); coordinates are shares of the image's
width and height. See https://docs.ultralytics.com/datasets/segment/.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet, checked_names, read_names
from sam3lora.data.convert.layout import open_image, place_images
from sam3lora.data.convert.yolo_files import find_label_files, read_description
from sam3lora.data.faults import FaultLog
from sam3lora.data.masks import join_outlines, parse_segmentation, trace_outlines
from sam3lora.data.split_files import WHOLE
from sam3lora.errors import UserError

SLACK = 0.05  # more than rounding and objects cut by the border need; pixels taken for shares are far above


def read_yolo(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits.

    Args:
        source: Folder with `data.yaml`, or with `images/<split>` and `labels/<split>`, or `<split>/images` and
            `<split>/labels`; see `sam3lora.data.convert.yolo_files`.
        names: Category names by class index; None reads them from `data.yaml` or `classes.txt`.

    Raises:
        UserError: There are no names, or a label file is invalid or has key points; the message names file and line.
    """
    description_file, description = read_description(source)
    by_class = dict(enumerate(names)) if names else _find_names(source, description_file, description)
    splits: dict[str, list[LabelledImage]] = {}
    for split, files in find_label_files(source, description_file, description, log).items():
        splits[split] = []
        for path, label_file in files.items():
            image = open_image(path, log)
            if image is None:
                continue
            if label_file.is_file():
                _read_labels(label_file, image, by_class, log)
            else:
                log.add("unlabelled_negative", str(path))
            splits[split].append(image)
    return LabelledSet([by_class[index] for index in sorted(by_class)], splits)


def _read_labels(label_file: Path, image: LabelledImage, names: dict[int, str], log: FaultLog) -> None:
    try:
        lines = label_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{label_file} is not a text file; expected lines 'class x y ...'") from None
    height, width = image.size_hw
    seen = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{label_file}, line {number}"
        if line in seen:
            log.add("repeated_label", where)
            continue
        seen.add(line)
        category, coordinates = _parse_line(line, where, names)
        if len(coordinates) == 4:
            x, y, w, h = coordinates
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * (width, height, width, height)
            image.add_box(category, box.tolist(), log, where)
        else:
            polygon = np.reshape(coordinates, (-1, 2)) * (width, height)
            image.add_mask(category, [polygon.ravel().tolist()], log, where)


def _parse_line(line: str, where: str, names: dict[int, str]) -> tuple[str, list[float]]:
    """(category name, coordinates as shares)."""
    try:
        index, *coordinates = (float(word) for word in line.split())
    except ValueError:
        raise UserError(f"{where}: expected numbers 'class x y ...', got {line.strip()[:60]!r}") from None
    if index not in names:
        raise UserError(f"{where}: class index {index:g} is not among 0..{max(names)} ({', '.join(names.values())})")
    if len(coordinates) != 4 and (len(coordinates) < 6 or len(coordinates) % 2):
        raise UserError(
            f"{where}: expected 4 coordinates (box) or an even number of at least 6 (polygon), got {len(coordinates)}"
            + ("; a fifth number is a confidence, which predictions have and labels do not" * (len(coordinates) == 5))
        )
    bad = [value for value in coordinates if not -SLACK <= value <= 1 + SLACK]
    if bad:
        raise UserError(
            f"{where}: coordinate {bad[0]:g} lies outside 0..1; YOLO coordinates are shares of the image's size"
        )
    return names[int(index)], coordinates


def _find_names(source: Path, description_file: Path, description: Mapping[str, Any]) -> dict[int, str]:
    """Class index -> name, from the description or from `classes.txt`."""
    if description.get("names"):
        return _indexed(description["names"], description_file)
    for path in (source / "classes.txt", source / "labels" / "classes.txt"):
        if path.is_file():
            return dict(enumerate(read_names(path)))
    raise UserError(f"{source}: found no data.yaml with names and no classes.txt; give --names in the order of classes")


def _indexed(names: Any, path: Path) -> dict[int, str]:
    if isinstance(names, dict):
        if not all(isinstance(index, int) and index >= 0 for index in names):
            raise UserError(f"{path}: names must be numbered 0, 1, ..., got {reprlib.repr(list(names))}")
        return dict(zip(names, checked_names([*names.values()], str(path)), strict=True))
    if not isinstance(names, list):
        raise UserError(f"{path}: names must be a list or numbered, got {reprlib.repr(names)}")
    return dict(enumerate(checked_names(names, str(path))))


def write_yolo(labelled: LabelledSet, folder: Path, log: FaultLog, *, boxes: bool = False) -> None:
    """Write `images/<split>`, `labels/<split>` and `data.yaml`, as Ultralytics reads them.

    An image without objects gets an empty label file. A line holds one polygon: the parts of an object are joined into
    one polygon, and its holes are filled.
    """
    classes = {name: index for index, name in enumerate(labelled.categories)}
    for split, images in labelled.splits.items():
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for image, path in zip(images, place_images(images, folder / "images" / split, log), strict=True):
            lines = []
            for number, thing in enumerate(image.objects, 1):
                where = f"{image.path}, object {number}"
                shares = _box_shares(thing, image) if boxes else _polygon_shares(thing, image, log, where)
                lines.append(" ".join([str(classes[thing.category]), *(f"{value:.6f}" for value in shares)]))
            (labels / f"{path.stem}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _write_description(labelled, folder)


def _box_shares(thing: LabelledObject, image: LabelledImage) -> np.ndarray:
    height, width = image.size_hw
    x, y, w, h = thing.bbox_xywh
    return np.array([x + w / 2, y + h / 2, w, h]) / (width, height, width, height)


def _polygon_shares(thing: LabelledObject, image: LabelledImage, log: FaultLog, where: str) -> np.ndarray:
    height, width = image.size_hw
    segmentation = parse_segmentation(thing.segmentation)
    if isinstance(segmentation, list) and len(segmentation) == 1:
        ring = np.reshape(segmentation[0], (-1, 2))
    else:
        if segmentation is None:
            log.add("box_as_mask", where)
        outlines, num_holes = trace_outlines(thing.decode(image.size_hw))
        for _ in range(num_holes):
            log.add("hole", where)
        ring = join_outlines(outlines) if outlines else _box_corners(thing)
    return np.clip(ring / (width, height), 0, 1).ravel()


def _box_corners(thing: LabelledObject) -> np.ndarray:
    """The rectangle of a thing whose parts are so thin that its mask has no pixel."""
    x, y, w, h = thing.bbox_xywh
    return np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])


def _write_description(labelled: LabelledSet, folder: Path) -> None:
    paths: dict[str, str] = {}
    for split in labelled.splits:
        if split == WHOLE:
            paths |= {"train": "images", "val": "images"}
        else:
            paths["val" if split == "valid" else split] = f"images/{split}"
    content = {**paths, "names": dict(enumerate(labelled.categories))}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
