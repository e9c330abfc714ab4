"""A split with a damaged image, and the same split without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from sam3lora.data.coco import ANNOTATION_FILE

from .splits import HEIGHT, WIDTH, write_split

NAMES = {1: "crack", 2: "gear", 3: "red bolt"}
OBJECTS = [(0, 1, 10), (0, 2, 40), (1, 1, 20), (1, 3, 50), (2, 3, 5), (2, 2, 30), (3, 1, 45)]
DAMAGED = 1  # whose categories other images show, too


def write_noisy(folder: Path) -> Path:
    """Five images of noise, the last without an object."""
    write_split(folder, OBJECTS, NAMES, num_images=5)
    rng = np.random.default_rng(0)
    for path in sorted(folder.glob("*.png")):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))
    return folder


def cut(path: Path) -> None:
    """Damage that is seen ahead."""
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(path: Path) -> None:
    """Damage that only decoding shows."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(bytes(content))


def damaged_and_fewer(folder: Path, damage: Callable[[Path], None]) -> tuple[Path, Path]:
    """A split in which image `DAMAGED` cannot be read, and a copy that does not list it."""
    damaged = write_noisy(folder / "damaged" / "valid")
    fewer = folder / "fewer" / "valid"
    shutil.copytree(damaged, fewer)
    content = json.loads((fewer / ANNOTATION_FILE).read_text())
    content["images"] = [one for one in content["images"] if one["id"] != DAMAGED]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != DAMAGED]
    (fewer / ANNOTATION_FILE).write_text(json.dumps(content))
    damage(damaged / f"{DAMAGED}.png")
    return damaged, fewer


def numbers(metrics) -> dict:
    """All that was measured, without what tells of the damaged image."""
    values = metrics.to_dict()
    notes = [note for note in values["notes"] if not note.startswith(("1 x image that was", "2 x label of an image"))]
    return {k: v for k, v in values.items() if k not in ("seconds", "settings", "skipped_images")} | {"notes": notes}
