"""Copies of a data set with other annotations, or with images cut short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def rewritten(scenes: Path, folder: Path, change: Callable[[dict], None], split: str = "valid") -> Path:
    """The data set with changed annotations of a split."""
    shutil.copytree(scenes, folder)
    rewrite(folder / split, change)
    return folder


def rewrite(split: Path, change: Callable[[dict], None]) -> None:
    file = split / "_annotations.coco.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_objects(image_id: int) -> Callable[[dict], None]:
    """A change that removes the annotations of an image."""

    def change(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image_id]

    return change


def with_broken_images(scenes: Path, folder: Path, *names: str) -> Path:
    """The data set with these images, such as `train/00002.jpg`, cut short."""
    shutil.copytree(scenes, folder)
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    return folder
