"""A labelled data set in memory: what every format is read into and written from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.masks import decode_mask, mask_box
from sam3lora.data.prompts import prompt_key

Box = tuple[float, float, float, float]


@dataclass
class LabelledObject:
    """One object of an image.

    Args:
        category: One of the set's category names.
        segmentation: Polygons `[[x0, y0, ...], ...]` in pixels, a COCO RLE, or None for a box alone.
        bbox_xywh: Box in pixels, within the image.
        iscrowd: Whether it stands for an uncounted crowd.
    """

    category: str
    segmentation: list | dict | None
    bbox_xywh: Box
    iscrowd: bool = False

    def decode(self, size_hw: tuple[int, int]) -> np.ndarray:
        """Boolean mask (H, W); the box's rectangle without a mask."""
        if self.segmentation is None:
            x, y, w, h = self.bbox_xywh
            return decode_mask([[x, y, x + w, y, x + w, y + h, x, y + h]], size_hw)
        return decode_mask(self.segmentation, size_hw)


@dataclass
class LabelledImage:
    """An image file with its objects; `size_hw` is the size in pixels that their coordinates refer to."""

    path: Path
    size_hw: tuple[int, int]
    objects: list[LabelledObject] = field(default_factory=list)

    def add_mask(self, category: str, segmentation: list | dict, log: FaultLog, where: str) -> None:
        """Append an object with a mask; polygons are clipped to the image, one without any area is counted and dropped.

        Args:
            category: Its name.
            segmentation: Polygons in pixels, or a COCO RLE of the image's size.
            log: Where faults are counted.
            where: How messages name the label.
        """
        extent = None
        if isinstance(segmentation, list):
            segmentation = [self._clip(part, log, where) for part in segmentation]
            extent = _extent(segmentation)  # a polygon thinner than a pixel may miss every pixel's centre
        self._append(category, segmentation, mask_box(segmentation, self.size_hw) or extent, log, where)

    def add_box(self, category: str, box_xyxy: Sequence[float], log: FaultLog, where: str) -> None:
        """Append an object with a box alone; as `add_mask`, the box in pixels."""
        self._append(category, None, _extent([self._clip(box_xyxy, log, where)]), log, where)

    def _append(
        self, category: str, segmentation: list | dict | None, box: Box | None, log: FaultLog, where: str
    ) -> None:
        if box is None:
            log.add("empty_object", where)
        else:
            self.objects.append(LabelledObject(category, segmentation, box))

    def _clip(self, coordinates: Sequence[float], log: FaultLog, where: str) -> list[float]:
        """x0, y0, x1, y1, ... moved into the image."""
        height, width = self.size_hw
        points = np.reshape(np.asarray(coordinates, dtype=float), (-1, 2))
        clipped = np.clip(points, 0, (width, height))
        if np.abs(points - clipped).max() > 1:  # less is rounding
            log.add("outside", where)
        return np.round(clipped.ravel(), 3).tolist()


@dataclass
class LabelledSet:
    """Images by split (`.` where a folder has no splits) and all category names in their order.

    Names that are one prompt become one category, in the first one's spelling.
    """

    categories: list[str]
    splits: dict[str, list[LabelledImage]]

    def __post_init__(self) -> None:
        spelling: dict[str, str] = {}
        for name in self.categories:
            spelling.setdefault(prompt_key(name), name)
        self.categories = list(spelling.values())
        for image in self.images():
            for thing in image.objects:
                thing.category = spelling[prompt_key(thing.category)]

    def images(self) -> Iterator[LabelledImage]:
        """Those of all splits."""
        return chain.from_iterable(self.splits.values())

    def drop_crowds(self, log: FaultLog) -> None:
        """Leave out crowd regions, for a format that cannot tell them from objects."""
        for image in self.images():
            for thing in image.objects:
                if thing.iscrowd:
                    log.add("crowd", f"{image.path.name}, {thing.category}")
            image.objects = [thing for thing in image.objects if not thing.iscrowd]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Split -> `num_images`, `num_negatives`, `num_objects` and `categories` (name -> objects)."""
        return {name: _summarise(images, self.categories) for name, images in self.splits.items()}


def encode_bitmap(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a mask, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _extent(polygons: list[list[float]]) -> Box | None:
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in polygons])
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return (x0, y0, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None


def _summarise(images: Sequence[LabelledImage], categories: Sequence[str]) -> dict[str, Any]:
    counts = Counter(thing.category for image in images for thing in image.objects)
    return {
        "num_images": len(images),
        "num_negatives": sum(not image.objects for image in images),
        "num_objects": counts.total(),
        "categories": {name: counts[name] for name in categories},
    }
