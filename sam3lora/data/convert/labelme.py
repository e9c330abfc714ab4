"""Reading LabelMe: one JSON file per image, with a list of shapes in pixels (https://github.com/wkentaro/labelme)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet, order_names
from sam3lora.data.convert.layout import image_files, open_image, split_folders
from sam3lora.data.faults import FaultLog
from sam3lora.errors import UserError

CIRCLE_CORNERS = 64


def read_labelme(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits.

    Polygons and circles become masks, rectangles become boxes without masks. Polygons with the same label and
    `group_id` are parts of one object. Images embedded in a JSON file are not read: the image file must lie beside it.

    Args:
        source: Folder with JSON files beside the images, or with one such subfolder per split.
        names: Category names in order; None takes those found, in alphabetical order.

    Raises:
        UserError: A JSON file is invalid; the message names it.
    """
    splits = {split: _read_split(folder, log) for split, folder in split_folders(source, "*.json").items()}
    found = {thing.category for images in splits.values() for image in images for thing in image.objects}
    return LabelledSet(order_names(sorted(found), names, source), splits)


def _read_split(folder: Path, log: FaultLog) -> list[LabelledImage]:
    split, used = [], set()
    files = {path.name: path for path in image_files(folder)}
    by_stem = {path.stem: path for path in files.values()}
    for label_file in sorted(folder.glob("*.json")):
        content = _parse(label_file)
        named = Path(str(content.get("imagePath", "")).replace("\\", "/")).name
        path = files.get(named) or by_stem.get(label_file.stem)
        if path is None:
            log.add("label_without_image", str(label_file))
            continue
        used.add(path)
        image = open_image(path, log)
        if image is not None:
            _read_shapes(label_file, content, image, log)
            split.append(image)
    for path in files.values():
        if path not in used:
            log.add("unlabelled_image", str(path))
    return split


def _parse(label_file: Path) -> dict[str, Any]:
    try:
        content = json.loads(label_file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{label_file} is not valid JSON ({error}); is the file truncated?") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(f"{label_file} is not a LabelMe file: expected an object with a list of shapes")
    return content


def _read_shapes(label_file: Path, content: dict[str, Any], image: LabelledImage, log: FaultLog) -> None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        image.use_label_size((height, width), log, str(label_file))
    polygons: dict[Any, list[list[float]]] = {}
    labels: dict[Any, tuple[str, str]] = {}
    for number, shape in enumerate(content["shapes"], 1):
        where = f"{label_file}, shape {number}"
        label, kind, points = _parse_shape(shape, where)
        if kind == "rectangle" and len(points) >= 2:  # two opposite corners, or all four
            image.add_box(label, (*points.min(axis=0), *points.max(axis=0)), log, where)
            continue
        if kind == "circle" and len(points) == 2:
            points = _circle(*points)
        elif kind != "polygon" or len(points) < 3:
            log.add("skipped_shape", f"{where}: {kind} of {len(points)} points")
            continue
        group = shape.get("group_id")
        key = number if group is None else (label, str(group))
        labels.setdefault(key, (label, where))
        polygons.setdefault(key, []).append(points.ravel().tolist())
    for key, (label, where) in labels.items():
        image.add_mask(label, polygons[key], log, where)


def _parse_shape(shape: Any, where: str) -> tuple[str, str, np.ndarray]:
    """(label, kind, points of shape (N, 2))."""
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}: expected a label, got {label!r}")
    try:
        points = np.asarray(shape["points"], dtype=float).reshape(-1, 2)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: expected points [[x, y], ...], got {str(shape.get('points'))[:60]}") from None
    if not np.isfinite(points).all():
        raise UserError(f"{where}: points must be finite numbers")
    return label.strip(), str(shape.get("shape_type") or "polygon"), points


def _circle(centre: np.ndarray, edge: np.ndarray) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
    return centre + np.hypot(*(edge - centre)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
