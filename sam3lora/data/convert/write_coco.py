"""COCO folders: `_annotations.coco.json` beside the images, a folder a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet
from sam3lora.data.convert.layout import place_images
from sam3lora.data.masks import mask_area


def write_coco(labelled: LabelledSet, folder: Path, log: FaultLog) -> None:
    """Write every split; ids count from 1, in order, and areas are those of the masks (of the boxes without one)."""
    ids = {name: number for number, name in enumerate(labelled.categories, 1)}
    for split, images in labelled.splits.items():
        files = place_images(images, folder / split, log)
        content = _content(images, [path.name for path in files], ids)
        (folder / split / ANNOTATION_FILE).write_text(json.dumps(content), encoding="utf-8")


def _content(images: list[LabelledImage], file_names: list[str], ids: dict[str, int]) -> dict[str, list]:
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (image, file_name) in enumerate(zip(images, file_names, strict=True), 1):
        height, width = image.size_hw
        entries.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for thing in image.objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[thing.category]}
            annotations.append(annotation | _describe(thing, image.size_hw))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def _describe(thing: LabelledObject, size_hw: tuple[int, int]) -> dict[str, Any]:
    box_area = thing.bbox_xywh[2] * thing.bbox_xywh[3]
    return {
        "bbox": list(thing.bbox_xywh),
        "area": mask_area(thing.segmentation, size_hw) or box_area,
        "segmentation": thing.segmentation or [],
        "iscrowd": int(thing.iscrowd),
    }
