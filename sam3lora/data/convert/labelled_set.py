"""A labelled data set in memory, with its category names: every format is read into it and written from it."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.faults import FaultLog
from sam3lora.data.images import MAX_MEGAPIXELS
from sam3lora.data.masks import Segmentation, decode_mask, mask_box
from sam3lora.data.prompts import plain_name, prompt_key
from sam3lora.errors import UserError

BoxXywh = tuple[float, float, float, float]


@dataclass
class LabelledObject:
    """One object of an image, or an uncounted crowd.

    `segmentation` holds polygons `[[x0, y0, ...], ...]` in pixels, a COCO RLE, JSON text of either (see
    `sam3lora.data.masks`), or None for an object with only a box.
    The box is in pixels, within the image.
    """

    category: str
    segmentation: Segmentation
    bbox_xywh: BoxXywh
    iscrowd: bool = False

    def decode(self, size_hw: tuple[int, int]) -> np.ndarray:
        """Boolean mask (H, W); the rectangle of the box if there is no mask."""
        if self.segmentation is None:
            x, y, w, h = self.bbox_xywh
            return decode_mask([[x, y, x + w, y, x + w, y + h, x, y + h]], size_hw)
        return decode_mask(self.segmentation, size_hw)


@dataclass
class LabelledImage:
    """An image file with its objects, whose coordinates refer to a size of `size_hw` pixels.

    `void` is the region of which nothing is known, see `sam3lora.data.void`. `lost` has the categories of labels that
    could not be used; None for one whose category is not known.
    """

    path: Path
    size_hw: tuple[int, int]
    objects: list[LabelledObject] = field(default_factory=list)
    void: Segmentation = None
    lost: set[str | None] = field(default_factory=set)

    def use_label_size(self, size_hw: tuple[int, int], log: FaultLog, where: str) -> None:
        """Let coordinates refer to the size that the label file gives; another one than the image's is counted.

        Raises:
            UserError: That size is larger than any image may be.
        """
        if size_hw != self.size_hw:
            (height, width), (own_height, own_width) = size_hw, self.size_hw
            if height * width > MAX_MEGAPIXELS * 1e6:
                raise UserError(
                    f"{where} gives an image size of {width} x {height}, and its image has {own_width} x {own_height}: "
                    "correct it"
                )
            log.add("label_size_mismatch", f"{where}: {width} x {height}, image {own_width} x {own_height}")
            self.size_hw = size_hw

    def add_mask(self, category: str, segmentation: list | dict, log: FaultLog, where: str) -> None:
        """Append an object with a mask. Polygons are clipped to the image; an object without area is dropped.

        `segmentation` holds polygons in pixels, or a COCO RLE of the image's size; `where` names the label in faults.
        """
        extent = None
        if isinstance(segmentation, list):
            segmentation = [self.clip(part, log, where) for part in segmentation]
            extent = _extent(segmentation)  # a polygon thinner than a pixel may miss every pixel's centre
        self._append(category, segmentation, mask_box(segmentation, self.size_hw) or extent, log, where)

    def add_box(self, category: str, box_xyxy: Sequence[float], log: FaultLog, where: str) -> None:
        """Append an object without a mask; the box is in pixels. Otherwise as `add_mask`."""
        self._append(category, None, _extent([self.clip(box_xyxy, log, where)]), log, where)

    def lose(self, category: str | None, kind: str, log: FaultLog, where: str) -> None:
        """Count a label that cannot be used."""
        log.add(kind, where)
        self.lost.add(category)

    def is_incomplete(self, categories: Iterable[str]) -> bool:
        """Whether the image would pass for one without objects, or without one of these categories, only because
        labels were lost."""
        shown = {prompt_key(thing.category) for thing in self.objects}
        missing = {prompt_key(name) for name in self.lost if name is not None} - shown
        return bool(self.lost) and (not shown or bool(missing & set(map(prompt_key, categories))))

    def _append(
        self, category: str, segmentation: list | dict | None, box: BoxXywh | None, log: FaultLog, where: str
    ) -> None:
        if box is None:
            self.lose(category, "empty_object", log, where)
        else:
            self.objects.append(LabelledObject(category, segmentation, box))

    def clip(self, coordinates: Sequence[float], log: FaultLog, where: str) -> list[float]:
        """x0, y0, x1, y1, ... moved into the image; UserError if one is not a finite number."""
        height, width = self.size_hw
        points = np.reshape(np.asarray(coordinates, dtype=float), (-1, 2))
        if not np.isfinite(points).all():
            raise UserError(f"{where}: coordinates must be finite numbers")
        clipped = np.clip(points, 0, (width, height))
        if np.abs(points - clipped).max() > 1:  # a smaller excess is rounding
            log.add("out_of_bounds", where)
        return np.round(clipped.ravel(), 3).tolist()


@dataclass
class LabelledSet:
    """Images by split (`.` for a folder without splits), and all category names in order.

    Names that are the same prompt become one category, in the spelling of the first.
    """

    categories: list[str]
    splits: dict[str, list[LabelledImage]]

    def __post_init__(self) -> None:
        spelling: dict[str, str] = {}
        for name in self.categories:
            spelling.setdefault(prompt_key(plain_name(name)), plain_name(name))
        self.categories = list(spelling.values())
        for image in self.images():
            for thing in image.objects:
                thing.category = spelling[prompt_key(plain_name(thing.category))]

    def images(self) -> Iterator[LabelledImage]:
        return chain.from_iterable(self.splits.values())

    def drop_crowds(self, log: FaultLog) -> None:
        """Leave out crowd and void regions, for a format that cannot mark them."""
        for image in self.images():
            if image.void is not None:
                image.lose(None, "void_pixels", log, image.path.name)
                image.void = None
            for thing in image.objects:
                if thing.iscrowd:
                    image.lose(thing.category, "dropped_crowd", log, f"{image.path.name}, {thing.category}")
            image.objects = [thing for thing in image.objects if not thing.iscrowd]

    def drop_incomplete(self, log: FaultLog) -> None:
        """Leave out images that would pass for negatives because labels were lost."""
        for split, images in self.splits.items():
            for image in images:
                if image.is_incomplete(self.categories):
                    log.add("incomplete_image", str(image.path))
                    if image.objects:
                        log.add("left_out_label", count=len(image.objects))
            self.splits[split] = [image for image in images if not image.is_incomplete(self.categories)]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Split -> `num_images`, `num_negatives`, `num_objects` and `categories` (name -> objects)."""
        return {name: _summarise(images, self.categories) for name, images in self.splits.items()}


def checked_names(names: Sequence[Any], source: str) -> list[str]:
    """Category names without surrounding white space.

    Raises:
        UserError: There is no name, or one that is not text.
    """
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{source}: expected category names, got {reprlib.repr(list(names))}")
    return [name.strip() for name in names]


def read_names(path: Path) -> list[str]:
    """Category names from a file with one per line; empty lines at the end are ignored.

    Raises:
        UserError: There is no name, or an empty line between names.
    """
    return checked_names(path.read_text(encoding="utf-8-sig").rstrip().splitlines(), str(path))


def order_names(found: Sequence[str], names: Sequence[str] | None, source: Path) -> list[str]:
    """Category names in the order of `names`; as found, if `names` is None.

    Raises:
        UserError: `names` lacks one that was found.
    """
    if names is None:
        return list(found)
    known = {prompt_key(name) for name in names}
    missing = [name for name in found if prompt_key(name) not in known]
    if missing:
        raise UserError(f"{source} has objects named {', '.join(missing)}, which --names lacks: {', '.join(names)}")
    return list(names)


def _extent(polygons: list[list[float]]) -> BoxXywh | None:
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
