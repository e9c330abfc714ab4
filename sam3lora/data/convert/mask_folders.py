"""Finding the folders of images and of mask images, in the layouts that data sets of masks have.

images/<split>/ masks/<split>/   <split>/images/ <split>/masks/   images/ masks/
the same with image, imgs or img, and with mask, gt, gts or ground_truth, in any case
train_images/ train_masks/, DUTS-TR-Image/ DUTS-TR-Mask/: a name, which may say the split, and what it is
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from sam3lora.data.convert.layout import distinct_subfolders, image_files, splits_within
from sam3lora.data.split_files import SPLITS, split_name, subfolders
from sam3lora.errors import UserError

IMAGES, MASKS = "images", "masks"
_KINDS = {
    IMAGES: ("images", "image", "imgs", "img"),
    MASKS: ("masks", "mask", "gts", "gt", "ground_truth", "groundtruth"),
}
_SHORT_SPLITS = {"tr": "train", "te": "test"}


def find_mask_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of images, folder of masks, which may be missing), as `find_pairs`.

    Raises:
        UserError: Two folders could be the images, the masks or the whole of one split.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    for place in [root, *distinct_subfolders(root)]:
        siblings = _siblings(place)
        for name, (images, masks) in siblings.items():
            split = _split_said_by(name)
            if split in SPLITS or (name and len(siblings) > 1):
                found = {split: (images, masks)}
            elif place == root:
                found = splits_within(images, masks) if masks.is_dir() else {}
            else:
                found = {split_name(place.name): (images, masks)}
            for split in found.keys() & pairs.keys():
                raise UserError(f"{pairs[split][0]} and {images} would both be {split}: join or rename them")
            pairs |= found
    return pairs


def masks_advice(root: Path) -> str:
    """What to do with a data set of masks where a COCO data set is expected; "" if it is none."""
    try:
        folders = [masks for _, masks in find_mask_folders(root).values() if masks.is_dir()]
    except UserError:  # which `sam3lora data convert` tells
        return ""
    if not folders:
        return ""
    command = f"sam3lora data convert {shlex.quote(str(root))} NEW --from masks --names NAME ..."
    return f"{folders[0]} holds mask images: make a COCO data set of them with {command}"


def _siblings(place: Path) -> dict[str, tuple[Path, Path]]:
    """What is left of their names -> folders of images and of masks beside each other; "" if nothing is left."""
    found: dict[str, dict[str, list[Path]]] = {}
    for folder in subfolders(place):
        for kind, words in _KINDS.items():
            if match := re.fullmatch(rf"(?:(.*)[-_ ])?({'|'.join(words)})", folder.name, re.IGNORECASE):
                found.setdefault((match[1] or "").casefold(), {}).setdefault(kind, []).append(folder)
    pairs = {}
    for name, folders in found.items():
        masks = _only(folders.get(MASKS, []), MASKS)
        if masks is None:  # the images of a split without masks are counted, those of anything else are not
            images = place / IMAGES if place / IMAGES in folders.get(IMAGES, []) else None
        else:
            images = _only(folders.get(IMAGES, []), IMAGES)
        if images is not None:
            pairs[name] = images, masks or place / MASKS
    return pairs


def _only(folders: list[Path], usual: str) -> Path | None:
    """The one with the usual name, or else the only one that holds images."""
    named = [folder for folder in folders if folder.name == usual]
    filled = named or [folder for folder in folders if image_files(folder)]
    if len(filled) > 1:
        raise UserError(f"{filled[0]} and {filled[1]} could both hold the {usual}: name the one to use {usual}")
    return filled[0] if filled else None


def _split_said_by(name: str) -> str:
    """The split that a name ends in, or the whole name.

    >>> _split_said_by("duts-tr"), _split_said_by("crack_val"), _split_said_by("night")
    ('train', 'valid', 'night')
    """
    last = re.split(r"[-_ ]", name)[-1]
    split = split_name(_SHORT_SPLITS.get(last, last))
    return split if split in SPLITS else name
