"""Reading and writing mask images: one PNG per image, whose pixel values name categories or objects; 0 is background.

semantic, one category       black and white (0 and 255, or 0 and 1); 255 is void beside 1, see `OneCategory`
semantic, several            value v is category v, 255 is void
instances, one category      every value is an object
instances, several           value 1000 v + k is object k of category v (as in Cityscapes)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet, read_names
from sam3lora.data.convert.layout import image_files, key_in, open_image, place_images
from sam3lora.data.convert.mask_folders import find_mask_folders
from sam3lora.data.convert.mask_values import VOID, OneCategory, black_and_white, read_values
from sam3lora.data.faults import FaultLog
from sam3lora.data.label_palette import palette_image
from sam3lora.data.masks import decode_mask
from sam3lora.data.rle import encode_rle
from sam3lora.data.split_files import WHOLE
from sam3lora.errors import UserError

NAMES_FILE = "classes.txt"
INSTANCE_STEP = 1000
BACKGROUND = "background"
_MAX_VALUE = 65535  # of a 16-bit PNG


def read_masks(
    source: Path, names: Sequence[str] | None, log: FaultLog, *, instances: bool = False, components: bool = False
) -> LabelledSet:
    """Read all splits.

    Args:
        source: Folder with images and masks, see `find_mask_folders`. A mask has the name of its image, or that name
            and `_mask`.
        names: Category names, the first for value 1; None reads them from `classes.txt`. A leading "background" is
            left out.
        instances: Whether values number objects instead of categories.
        components: Whether every connected part (8 neighbours) of a semantic mask is an object; otherwise an image has
            one object per category.

    Raises:
        UserError: There are no names, a mask cannot be read or has another aspect ratio than its image, or a value has
            no category.
    """
    names = _find_names(source) if names is None else list(names)
    names_background = names[0].casefold() == BACKGROUND
    names = names[1:] if names_background else names
    one = OneCategory(names_background) if len(names) == 1 and not instances else None
    labeller = _Labeller(names, instances, components)
    splits = {}
    for split, (images, masks) in find_mask_folders(source).items():
        if masks.is_dir():
            splits[split] = _read_split(images, masks, split != WHOLE, labeller, one, log)
        else:
            log.add("unlabelled_split", f"{images}: no folder {masks}")
    wrong, are_numbers = one.misread(log) if one else ([], False)
    for image, mask_file in wrong:
        image.objects, image.void = [], None
        values_HW = read_values(mask_file, image, FaultLog(), colours=True)  # its faults are counted already
        labeller.add(image, values_HW if are_numbers else black_and_white(values_HW), mask_file, log)
    return LabelledSet(names, splits)


def _read_split(
    images: Path, masks: Path, nested: bool, labeller: _Labeller, one: OneCategory | None, log: FaultLog
) -> list[LabelledImage]:
    split = []
    mask_files: dict[str, Path] = {}
    for path in image_files(masks, nested=nested):
        other = mask_files.setdefault(key_in(masks, path).removesuffix("_mask"), path)
        if other != path:
            raise UserError(f"{other} and {path} would be masks of one image: remove one")
    for path in image_files(images, nested=nested):
        mask_file = mask_files.pop(key_in(images, path), None)
        if mask_file is None:
            log.add("unlabelled_image", str(path))
        elif image := open_image(path, log):
            values_HW = read_values(mask_file, image, log, colours=one is not None)
            if one:
                values_HW = one.numbers(values_HW, image, mask_file, log)
            labeller.add(image, values_HW, mask_file, log)
            split.append(image)
    for mask_file in mask_files.values():
        log.add("label_without_image", str(mask_file))
    return split


def _find_names(source: Path) -> list[str]:
    path = source / NAMES_FILE
    if not path.is_file():
        raise UserError(f"{source}: masks have no names; give --names (the first is value 1), or write {path}")
    return read_names(path)


@dataclass(frozen=True)
class _Labeller:
    """Makes objects of the values of a mask image."""

    names: Sequence[str]
    instances: bool
    components: bool

    def add(self, image: LabelledImage, values_HW: np.ndarray, mask_file: Path, log: FaultLog) -> None:
        for value in np.unique(values_HW[values_HW != 0]).tolist():
            mask_HW = values_HW == value
            if not self.instances and value == VOID and len(self.names) < VOID:
                image.void = encode_rle(mask_HW)
                continue
            for part_HW in self._parts(mask_HW):
                image.add_mask(self._category(value, mask_file), encode_rle(part_HW), log, str(mask_file))

    def _parts(self, mask_HW: np.ndarray) -> Iterator[np.ndarray]:
        if self.components and not self.instances:
            num_labels, labels_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
            yield from (labels_HW == label for label in range(1, num_labels))
        else:
            yield mask_HW

    def _category(self, value: int, mask_file: Path) -> str:
        names = self.names
        if self.instances and len(names) == 1:
            return names[0]
        index, number = divmod(value, INSTANCE_STEP) if self.instances else (value, 1)
        if 1 <= index <= len(names) and number:
            return names[index - 1]
        known = f"{INSTANCE_STEP} x category (1..{len(names)}) + object" if self.instances else f"1..{len(names)}"
        raise UserError(f"{mask_file}: value {value} is not among {known} ({', '.join(names)})")


def write_masks(labelled: LabelledSet, folder: Path, log: FaultLog, *, instances: bool = False) -> None:
    """Write `<split>/images`, `<split>/masks` and `classes.txt`. Where objects overlap, the smaller one is on top.

    Category numbers are written as 8-bit PNG with a palette, object numbers (`instances`, which has no value for crowd
    and void regions) as 16-bit PNG. Crowd and void regions are 255 where no object is.

    Raises:
        UserError: There are more categories or objects than pixel values.
    """
    names = labelled.categories
    if not instances and len(names) >= VOID:
        raise UserError(f"a mask image has values for {VOID - 1} categories, got {len(names)}")
    has_void = False
    for split, images in labelled.splits.items():
        masks = folder / split / "masks"
        masks.mkdir(parents=True)
        for image, path in zip(images, place_images(images, folder / split / "images", log), strict=True):
            if instances:
                canvas_HW = _paint(image, image.objects, _instance_values(image, names), log)
                picture = Image.fromarray(canvas_HW.astype(np.uint16))
            else:
                objects = [thing for thing in image.objects if not thing.iscrowd]
                canvas_HW = _paint(image, objects, [names.index(thing.category) + 1 for thing in objects], log)
                canvas_HW[_void_region(image) & (canvas_HW == 0)] = VOID
                has_void |= bool((canvas_HW == VOID).any())
                picture = palette_image(canvas_HW.astype(np.uint8))
            picture.save(masks / f"{path.stem}.png")
    lines = [BACKGROUND, *names] if has_void and len(names) == 1 else names  # see `OneCategory`
    (folder / NAMES_FILE).write_text("".join(f"{name}\n" for name in lines), encoding="utf-8")


def _void_region(image: LabelledImage) -> np.ndarray:
    """Boolean (H, W): void, and the crowd regions of all categories."""
    region_HW = decode_mask(image.void, image.size_hw)
    for thing in image.objects:
        if thing.iscrowd:
            region_HW |= thing.decode(image.size_hw)
    return region_HW


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


def _paint(image: LabelledImage, objects: Sequence[LabelledObject], values: Sequence[int], log: FaultLog) -> np.ndarray:
    """Pixel values (H, W) int32."""
    canvas_HW = np.zeros(image.size_hw, dtype=np.int32)
    masks = []
    for number, (thing, value) in enumerate(zip(objects, values, strict=True), 1):
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
