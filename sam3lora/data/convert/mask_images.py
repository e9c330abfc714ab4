"""Reading and writing mask images: one PNG per image, whose pixel values name categories or objects; 0 is background.

semantic, one category       black and white (0 and 255, or 0 and 1)
semantic, several            value v is category v
instances, one category      every value is an object
instances, several           value 1000 v + k is object k of category v (as in Cityscapes)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet, read_names
from sam3lora.data.convert.layout import find_pairs, image_files, key_in, open_image, place_images
from sam3lora.data.faults import FaultLog
from sam3lora.data.label_palette import palette_image
from sam3lora.data.rle import encode_rle
from sam3lora.data.split_files import WHOLE
from sam3lora.errors import UserError

NAMES_FILE = "classes.txt"
INSTANCE_STEP = 1000
VOID = 255
_MAX_STRETCH = 1.05  # between the aspect ratios of mask and image; beyond this the mask belongs to another image
_MAX_VALUE = 65535  # of a 16-bit PNG


def read_masks(
    source: Path, names: Sequence[str] | None, log: FaultLog, *, instances: bool = False, components: bool = False
) -> LabelledSet:
    """Read all splits.

    Args:
        source: Folder with `<split>/images` and `<split>/masks`, or `images/<split>` and `masks/<split>`. A mask has
            the name of its image, or that name and `_mask`.
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
    names = names[1:] if names[0].casefold() == "background" else names
    splits = {}
    for split, (images, masks) in find_pairs(source, "masks").items():
        if masks.is_dir():
            nested = split != WHOLE
            splits[split] = _read_split(images, masks, nested, names, log, instances, components)
        else:
            log.add("unlabelled_split", f"{images}: no folder {masks}")
    return LabelledSet(names, splits)


def _read_split(
    images: Path,
    masks: Path,
    nested: bool,
    names: Sequence[str],
    log: FaultLog,
    instances: bool,
    components: bool,
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
            values_HW = _fit(_read_values(mask_file, image, names, instances, log), image, mask_file, log)
            if not instances and len(names) == 1:
                values_HW = _binarise(values_HW, mask_file, log)
            for name, mask_HW in _separate(values_HW, names, mask_file, instances, components):
                if name is None:
                    image.lose(None, "void_pixels", log, str(mask_file))
                else:
                    image.add_mask(name, encode_rle(mask_HW), log, str(mask_file))
            split.append(image)
    for mask_file in mask_files.values():
        log.add("label_without_image", str(mask_file))
    return split


def _find_names(source: Path) -> list[str]:
    path = source / NAMES_FILE
    if not path.is_file():
        raise UserError(f"{source}: masks have no names; give --names (the first is value 1), or write {path}")
    return read_names(path)


def _read_values(
    mask_file: Path, image: LabelledImage, names: Sequence[str], instances: bool, log: FaultLog
) -> np.ndarray:
    """Pixel values (H, W) int32. Palette indices and grey values stay as they are; colours become grey."""
    try:
        with Image.open(mask_file) as picture:
            _check_shape(picture.size, image, mask_file)
            if picture.mode not in ("RGB", "RGBA", "LA", "CMYK"):
                return np.array(picture).astype(np.int32)
            if np.ptp(np.asarray(picture.convert("RGB")), axis=2).any():
                if instances or len(names) > 1:
                    raise UserError(f"{mask_file} is a colour image; expected one number a pixel (grey or palette)")
                log.add("colour_mask", str(mask_file))
            return np.array(picture.convert("L")).astype(np.int32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read mask {mask_file}: {error}") from None


def _check_shape(size_wh: tuple[int, int], image: LabelledImage, mask_file: Path) -> None:
    """Refuse a mask of another shape than its image before it is decoded."""
    stretch = (size_wh[0] / size_wh[1]) / (image.size_hw[1] / image.size_hw[0])
    if not 1 / _MAX_STRETCH < stretch < _MAX_STRETCH:
        raise UserError(f"{_sizes(size_wh, image, mask_file)}; a mask must have its image's shape")


def _sizes(size_wh: tuple[int, ...], image: LabelledImage, mask_file: Path) -> str:
    return f"{mask_file}: {size_wh[0]} x {size_wh[1]}, image {image.size_hw[1]} x {image.size_hw[0]}"


def _fit(values_HW: np.ndarray, image: LabelledImage, mask_file: Path, log: FaultLog) -> np.ndarray:
    """The mask at its image's size."""
    size_hw = values_HW.shape
    if size_hw == image.size_hw:
        return values_HW
    log.add("mask_resized", _sizes(size_hw[::-1], image, mask_file))
    return cv2.resize(values_HW, image.size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _separate(
    values_HW: np.ndarray, names: Sequence[str], mask_file: Path, instances: bool, components: bool
) -> Iterator[tuple[str | None, np.ndarray]]:
    """(category name, boolean mask (H, W)) of every object; without a name for void pixels."""
    for value in np.unique(values_HW[values_HW != 0]).tolist():
        mask_HW = values_HW == value
        if not instances and value == VOID and len(names) < VOID:
            yield None, mask_HW
            continue
        category = _category(value, names, instances)
        if category is None:
            known = f"1..{len(names)}" if not instances else f"{INSTANCE_STEP} x category (1..{len(names)}) + object"
            raise UserError(f"{mask_file}: value {value} is not among {known} ({', '.join(names)})")
        if components and not instances:
            num_labels, labels_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
            yield from ((category, labels_HW == label) for label in range(1, num_labels))
        else:
            yield category, mask_HW


def _binarise(values_HW: np.ndarray, mask_file: Path, log: FaultLog) -> np.ndarray:
    if values_HW.max() < 128:  # 0 and 1; larger values are refused later
        return values_HW
    if ((values_HW > 0) & (values_HW < 255)).any():
        log.add("grey_mask", str(mask_file))
    return (values_HW >= 128).astype(np.int32)


def _category(value: int, names: Sequence[str], instances: bool) -> str | None:
    if instances and len(names) == 1:
        return names[0]
    index, number = divmod(value, INSTANCE_STEP) if instances else (value, 1)
    return names[index - 1] if 1 <= index <= len(names) and number else None


def write_masks(labelled: LabelledSet, folder: Path, log: FaultLog, *, instances: bool = False) -> None:
    """Write `<split>/images`, `<split>/masks` and `classes.txt`. Where objects overlap, the smaller one is on top.

    Category numbers are written as 8-bit PNG with a palette, object numbers (`instances`) as 16-bit PNG.

    Raises:
        UserError: There are more categories or objects than pixel values.
    """
    if not instances and len(labelled.categories) >= VOID:
        raise UserError(f"a mask image has values for {VOID - 1} categories, got {len(labelled.categories)}")
    for split, images in labelled.splits.items():
        masks = folder / split / "masks"
        masks.mkdir(parents=True)
        for image, path in zip(images, place_images(images, folder / split / "images", log), strict=True):
            if instances:
                canvas_HW = _paint(image, _instance_values(image, labelled.categories), log)
                picture = Image.fromarray(canvas_HW.astype(np.uint16))
            else:
                values = [labelled.categories.index(thing.category) + 1 for thing in image.objects]
                picture = palette_image(_paint(image, values, log).astype(np.uint8))
            picture.save(masks / f"{path.stem}.png")
    (folder / NAMES_FILE).write_text("".join(f"{name}\n" for name in labelled.categories), encoding="utf-8")


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
