"""Mask images: `<split>/images`, `<split>/masks` and `classes.txt`; values as `read_masks` describes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet
from sam3lora.data.convert.layout import place_images
from sam3lora.data.convert.read_masks import INSTANCE_STEP, NAMES_FILE, VOID
from sam3lora.errors import UserError

_MAX_VALUE = 65535  # of a 16-bit PNG


def write_masks(labelled: LabelledSet, folder: Path, log: FaultLog, *, instances: bool = False) -> None:
    """Write every split; smaller objects lie over larger ones.

    Args:
        labelled: The set.
        folder: Where to write.
        log: Where faults are counted.
        instances: False writes category numbers as 8-bit PNG with a palette, True object numbers as 16-bit PNG.

    Raises:
        UserError: More categories or objects than pixel values.
    """
    if not instances and len(labelled.categories) >= VOID:
        raise UserError(f"a mask image has values for {VOID - 1} categories, got {len(labelled.categories)}")
    for split, images in labelled.splits.items():
        masks = folder / split / "masks"
        masks.mkdir(parents=True)
        for image, path in zip(images, place_images(images, folder / split / "images", log), strict=True):
            values = _instance_values(image, labelled.categories) if instances else _semantic_values(image, labelled)
            canvas_HW = _paint(image, values, log)
            if instances:
                picture = Image.fromarray(canvas_HW.astype(np.uint16))
            else:
                picture = Image.fromarray(canvas_HW.astype(np.uint8)).convert("P")
                picture.putpalette(_palette())
            picture.save(masks / f"{path.stem}.png")
    (folder / NAMES_FILE).write_text("".join(f"{name}\n" for name in labelled.categories), encoding="utf-8")


def _semantic_values(image: LabelledImage, labelled: LabelledSet) -> list[int]:
    return [labelled.categories.index(thing.category) + 1 for thing in image.objects]


def _instance_values(image: LabelledImage, categories: list[str]) -> list[int]:
    if len(categories) == 1:
        values = list(range(1, len(image.objects) + 1))
    else:
        numbers: Counter[str] = Counter()
        values = []
        for thing in image.objects:
            numbers[thing.category] += 1
            values.append(INSTANCE_STEP * (categories.index(thing.category) + 1) + numbers[thing.category])
        if max(numbers.values(), default=0) >= INSTANCE_STEP:
            raise UserError(
                f"{image.path}: more than {INSTANCE_STEP - 1} objects of a category do not fit a mask image"
            )
    if max(values, default=0) > _MAX_VALUE:
        raise UserError(f"{image.path}: a mask image has {_MAX_VALUE} values, category and object need {max(values)}")
    return values


def _paint(image: LabelledImage, values: list[int], log: FaultLog) -> np.ndarray:
    """Pixel values (H, W) int32."""
    canvas_HW = np.zeros(image.size_hw, dtype=np.int32)
    masks = []
    for number, (thing, value) in enumerate(zip(image.objects, values, strict=True), 1):
        where = f"{image.path}, object {number}"
        if thing.segmentation is None:
            log.add("box_as_mask", where)
        masks.append((thing.decode(image.size_hw), value, where))
    masks.sort(key=lambda item: -int(item[0].sum()))
    for mask_HW, value, _ in masks:
        canvas_HW[mask_HW] = value
    for mask_HW, value, where in masks:
        visible = canvas_HW[mask_HW] == value
        if not visible.any():
            log.add("hidden", where)
        elif visible.mean() < 0.9:
            log.add("covered", where)
    return canvas_HW


def _palette() -> list[int]:
    """Colours of the Pascal VOC palette: the bits of the value, dealt in turn to red, green and blue."""
    values = np.arange(256)
    channels = [sum(((values >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).ravel().tolist()
