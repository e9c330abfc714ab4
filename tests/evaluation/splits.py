"""Small splits, ground truth and answers drawn by hand."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.evaluation.metrics.coco_map import MapResult, coco_map

HEIGHT, WIDTH = 60, 80
NONSENSE = 1e12  # beyond every size range: an object of this area would be left out


def rle(x: int, y: int, side: int = 10, size_hw: tuple[int, int] = (60, 60)) -> dict:
    """A square."""
    mask = np.zeros(size_hw, np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    return {"size": list(size_hw), "counts": coco_mask.encode(mask)["counts"].decode()}


def truth(objects=(), images=(1,), names=("crack",), size_hw: tuple[int, int] = (60, 60)) -> dict:
    """COCO ground truth; objects are (image id, category, segmentation) and optionally more keys; ids count from 0."""
    known = {"iscrowd": 0, "area": NONSENSE}
    return {
        "images": [{"id": i, "height": size_hw[0], "width": size_hw[1]} for i in images],
        "annotations": [
            {"id": number, "image_id": i, "category_id": c, "segmentation": s} | known | dict(*more)
            for number, (i, c, s, *more) in enumerate(objects)
        ],
        "categories": [{"id": c, "name": name} for c, name in enumerate(names)],
    }


def hit(image: int, category: int, segmentation: dict, score: float = 0.9) -> dict:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "score": score}


def map_of(objects, hits, num_images: int, names=("crack",)) -> MapResult:
    """Objects are (image, category, mask, iscrowd), hits (image, category, mask, score); images count from 0."""
    found = [(i, c, mask, {"iscrowd": crowd}) for i, c, mask, crowd in objects]
    return coco_map(truth(found, range(num_images), names), [hit(*one) for one in hits], bbox=False)


def write_split(folder: Path, objects: list[tuple], names: dict[int, str], num_images: int = 2) -> Path:
    """A split of grey images; `objects` are (image id, category id, x of a 20 x 20 square at y = 10, more keys)."""
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
        | dict(*more)
        for number, (image, category, x, *more) in enumerate(objects)
    ]
    categories = [{"id": id_, "name": name} for id_, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATION_FILE).write_text(json.dumps(content))
    return folder


def result(image: int, category: int, x: int, score: float, width: int = 20) -> dict:
    """A COCO result: a rectangle 20 pixels high at y = 10."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[10:30, x : x + width] = 1
    segmentation = {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(mask)["counts"].decode()}
    return hit(image, category, segmentation, score) | {"bbox": [x, 10, width, 20]}
