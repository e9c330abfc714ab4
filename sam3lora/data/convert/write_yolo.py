"""YOLO boxes and segmentation: `images/<split>`, `labels/<split>` and `data.yaml`, as Ultralytics reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet
from sam3lora.data.convert.layout import WHOLE, place_images
from sam3lora.data.outlines import join_outlines, trace_outlines


def write_yolo(labelled: LabelledSet, folder: Path, log: FaultLog, *, boxes: bool = False) -> None:
    """Write every split; an image without objects gets an empty label file.

    Args:
        labelled: The set.
        folder: Where to write.
        log: Where faults are counted.
        boxes: Whether to write boxes instead of polygons. A line holds one polygon, so that an object in several parts
            becomes one line around all of them; its holes are filled.
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
                if shares.size:
                    lines.append(" ".join([str(classes[thing.category]), *(f"{value:.6f}" for value in shares)]))
                else:
                    log.add("empty_object", where)
            (labels / f"{path.stem}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _write_description(labelled, folder)


def _box_shares(thing: LabelledObject, image: LabelledImage) -> np.ndarray:
    height, width = image.size_hw
    x, y, w, h = thing.bbox_xywh
    return np.array([x + w / 2, y + h / 2, w, h]) / (width, height, width, height)


def _polygon_shares(thing: LabelledObject, image: LabelledImage, log: FaultLog, where: str) -> np.ndarray:
    height, width = image.size_hw
    if isinstance(thing.segmentation, list) and len(thing.segmentation) == 1:
        ring = np.reshape(thing.segmentation[0], (-1, 2))
    else:
        if thing.segmentation is None:
            log.add("box_as_mask", where)
        outlines, num_holes = trace_outlines(thing.decode(image.size_hw))
        for _ in range(num_holes):
            log.add("hole", where)
        if not outlines:
            return np.empty(0)
        ring = join_outlines(outlines)
    return np.clip(ring / (width, height), 0, 1).ravel()


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
