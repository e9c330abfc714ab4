"""Reading LabelMe: one JSON file per image, with a list of shapes in pixels (https://github.com/wkentaro/labelme)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet, order_names
from sam3lora.data.convert.labelme_shapes import read_shapes
from sam3lora.data.convert.layout import find_files, image_files, open_image, split_folders
from sam3lora.data.faults import FaultLog
from sam3lora.data.images import IMAGE_SUFFIXES
from sam3lora.data.split_files import WHOLE
from sam3lora.errors import UserError


def read_labelme(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits.

    Polygons, circles and masks become masks, rectangles become boxes without masks. Shapes with the same label and
    `group_id` are parts of one object. Images embedded in a JSON file are not read: the image file must be there.

    Args:
        source: Folder with JSON files beside the images, or with one such subfolder per split. The files of a split may
            lie in further folders.
        names: Category names in order; None takes those found, in alphabetical order.

    Raises:
        UserError: A JSON file is invalid; the message names it.
    """
    splits = {
        split: _read_split(folder, split != WHOLE, log) for split, folder in split_folders(source, ".json").items()
    }
    found = {thing.category for images in splits.values() for image in images for thing in image.objects}
    return LabelledSet(order_names(sorted(found), names, source), splits)


def _read_split(folder: Path, nested: bool, log: FaultLog) -> list[LabelledImage]:
    files = {_absolute(path) for path in image_files(folder, nested=nested)}
    beside = {path.with_suffix(""): path for path in sorted(files)}
    images: dict[Path, LabelledImage | None] = {}
    for label_file in find_files(folder, [".json"], nested=nested):
        content = _parse(label_file)
        path = _find_image(label_file, content, beside, log)
        if path is None:
            log.add("label_without_image", str(label_file))
            continue
        if path in images:
            log.add("shared_image", f"{path}: {label_file}")
        else:
            images[path] = open_image(path, log)
        image = images[path]
        if image is not None:
            _use_size(label_file, content, image, log)
            read_shapes(content["shapes"], image, log, str(label_file))
    for path in sorted(files - images.keys()):
        log.add("unlabelled_image", str(path))
    return [image for image in images.values() if image is not None]


def _parse(label_file: Path) -> dict[str, Any]:
    try:
        content = json.loads(label_file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label_file} is not valid JSON ({error}); is the file truncated?") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(f"{label_file} is not a LabelMe file: expected an object with a list of shapes")
    return content


def _find_image(label_file: Path, content: dict[str, Any], beside: dict[Path, Path], log: FaultLog) -> Path | None:
    """The image that the file names, relative to itself or beside it; else the one with its own name."""
    named = str(content.get("imagePath") or "").replace("\\", "/")
    name = named.rpartition("/")[2]
    for path in (label_file.parent / named, label_file.parent / name):
        if path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path):
            return _absolute(path)
    found = beside.get(_absolute(label_file).with_suffix(""))
    if found is not None and name:
        log.add("renamed_source_image", f"{label_file}: {named}")
    return found


def _use_size(label_file: Path, content: dict[str, Any], image: LabelledImage, log: FaultLog) -> None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        if image.objects and (height, width) != image.size_hw:
            raise UserError(
                f"{label_file} gives an image size of {width} x {height}, another label file of {image.path} "
                f"{image.size_hw[1]} x {image.size_hw[0]}: correct one"
            )
        image.use_label_size((height, width), log, str(label_file))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
