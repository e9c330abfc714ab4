"""Small splits and answers drawn by hand."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.coco import ANNOTATION_FILE

HEIGHT, WIDTH = 60, 80


def write_split(folder: Path, objects: list[tuple[int, int, int]], names: dict[int, str], num_images: int = 2) -> Path:
    """A split of grey images; `objects` are (image id, category id, x of a 20 x 20 square at y = 10)."""
    folder.mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(num_images)]
    for image in images:
        cv2.imwrite(str(folder / image["file_name"]), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "iscrowd": 0,
            "bbox": [x, 10, 20, 20],
            "segmentation": [[x, 10, x + 20, 10, x + 20, 30, x, 30]],
        }
        for number, (image, category, x) in enumerate(objects)
    ]
    categories = [{"id": id_, "name": name} for id_, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATION_FILE).write_text(json.dumps(content))
    return folder


def result(image: int, category: int, x: int, score: float, width: int = 20) -> dict:
    """A COCO result: a rectangle 20 pixels high at y = 10."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, x : x + width] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {
        "image_id": image,
        "category_id": category,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
        "bbox": [x, 10, width, 20],
        "score": score,
    }
