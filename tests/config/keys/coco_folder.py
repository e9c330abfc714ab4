"""A data set small enough to read: who shows what is written here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

SIDE = 64
CATEGORIES = ("crack", "hole", "moss")
# Category of each object, image by image.
TRAIN = (("crack", "crack", "crack", "hole"), ("crack",), ("hole",), ("moss",))
VALID = (("crack",), ("hole",))
ANNOTATION_FILE = "_annotations.coco.json"


def write_split(folder: Path, images: Sequence[Sequence[str]], annotation_file: str = ANNOTATION_FILE) -> Path:
    """Images of 64 x 64 noise, numbered from 0; object k of an image is a square of 12 at (2 + 14 k, 4 + 10 k)."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations: list[dict] = []
    for image_id, objects in enumerate(images):
        pixels = np.random.default_rng(image_id).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{image_id}.png"), pixels)
        for place, name in enumerate(objects):
            x, y = 2 + 14 * place, 4 + 10 * place
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES.index(name) + 1,
                    "bbox": [x, y, 12, 12],
                    "segmentation": [[x, y, x + 12, y, x + 12, y + 12, x, y + 12]],
                    "area": 144,
                    "iscrowd": 0,
                }
            )
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)],
    }
    (folder / annotation_file).write_text(json.dumps(content))
    return folder


def write_data(folder: Path) -> Path:
    write_split(folder / "train", TRAIN)
    write_split(folder / "valid", VALID)
    return folder
