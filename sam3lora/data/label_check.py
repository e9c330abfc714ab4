"""Checking a data set for dense prediction: what its label maps hold, by classes and pixels."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.coco import CocoIndex
from sam3lora.data.inspection import map_pieces
from sam3lora.data.label_maps import MOST_CLASSES, LabelMaps
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import find_splits, no_splits
from sam3lora.errors import UserError
from sam3lora.label_values import BACKGROUND, IGNORE
from sam3lora.progress import Progress

BACKGROUND_NAME = "background"  # a category of this name is no class


@dataclass
class ClassPixels:
    """One class in the label maps of a split, at the sizes of the images."""

    num_images: int = 0  # that show it
    num_pixels: int = 0  # of one label a pixel, the smaller object on top
    num_hidden: int = 0  # further pixels of its masks, where a smaller object of another class is on top


@dataclass
class LabelledSplit:
    """What the label maps of a split hold. Sizes are (height, width) in pixels."""

    name: str
    num_images: int
    num_pixels: int = 0  # of all images
    num_background: int = 0
    num_ignored: int = 0  # void, crowd regions, and boxes of objects without a mask
    num_empty_images: int = 0  # without a pixel of any class
    num_boxes: int = 0  # objects without a mask
    classes: dict[str, ClassPixels] = field(default_factory=dict)
    num_sizes: int = 0
    smallest_hw: tuple[int, int] = (0, 0)
    largest_hw: tuple[int, int] = (0, 0)
    commonest_hw: tuple[int, int] = (0, 0)

    def share(self, num_pixels: int) -> float:
        """Of the pixels that are not ignored; 0 if there are none."""
        return num_pixels / max(self.num_pixels - self.num_ignored, 1)

    @property
    def hidden_share(self) -> float:
        """Part of the pixels of all masks that one label a pixel cannot hold; 0 without masks."""
        hidden = sum(one.num_hidden for one in self.classes.values())
        return hidden / max(hidden + sum(one.num_pixels for one in self.classes.values()), 1)

    @property
    def ignored_share(self) -> float:
        return self.num_ignored / max(self.num_pixels, 1)

    def to_dict(self) -> dict[str, Any]:
        classes = {name: vars(one) | {"share": self.share(one.num_pixels)} for name, one in self.classes.items()}
        shares = {"hidden_share": self.hidden_share, "ignored_share": self.ignored_share}
        return {**vars(self), "classes": classes, "background_share": self.share(self.num_background), **shares}


@dataclass
class LabelReport:
    splits: list[LabelledSplit]

    def classes_in_one_split(self) -> dict[str, str]:
        """Class -> the only split with pixels of it; empty for a set of one split."""
        shown: dict[str, list[str]] = {}
        for split in self.splits:
            for name, one in split.classes.items():
                if one.num_pixels:
                    shown.setdefault(name, []).append(split.name)
        return {name: where[0] for name, where in shown.items() if len(where) == 1 and len(self.splits) > 1}

    def to_dict(self) -> dict[str, Any]:
        return {
            "splits": [split.to_dict() for split in self.splits],
            "classes_in_one_split": self.classes_in_one_split(),
        }


def check_labels(root: str | Path, *, num_processes: int = 0, progress: bool = False) -> LabelReport:
    """Paint the label maps of every image of a COCO data set, at the size of the image, and count their pixels.

    Images are not read. The arguments are as of `sam3lora.data.check.check_folder`.

    Raises:
        UserError: There is no data set, or it has more classes than a label map has values.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected a data set folder with train/ and valid/ inside")
    splits = find_splits(root)
    if not splits:
        raise UserError(no_splits(root))
    reports, num_images = [], 0
    style = "bar" if progress and sys.stderr.isatty() else "off"
    with Progress(unit="label maps", style=style, stderr=True, transient=True) as bar:
        for split in splits:
            index = split.read("skip", allow_empty=True)
            num_images += len(index)
            bar.update(num_images - len(index), total=num_images, note=split.name)
            reports.append(_check_split(split.name, index, bar, num_processes))
    return LabelReport(reports)


def _check_split(name: str, index: CocoIndex, bar: Progress, num_processes: int) -> LabelledSplit:
    names = [each for each in index.names if prompt_key(each) != BACKGROUND_NAME]
    if len(names) > MOST_CLASSES:
        raise UserError(f"{index.source} has {len(names)} categories; a label map has values for {MOST_CLASSES}")
    totals: Counter[str] = Counter()
    classes: dict[str, Counter[str]] = {each: Counter() for each in names}
    count = partial(_count_pixels, names)
    with contextlib.closing(map_pieces(index.table, count, num_processes=num_processes)) as pieces:
        for piece_totals, piece_classes in pieces:
            totals.update(piece_totals)
            for each, counts in piece_classes.items():
                classes[each].update(counts)
            bar.advance(piece_totals["num_images"])
    values: dict[str, Any] = {"num_images": 0, **totals, **_sizes(index)}
    return LabelledSplit(name, classes={each: ClassPixels(**counts) for each, counts in classes.items()}, **values)


def _count_pixels(names: Sequence[str], records: list[dict[str, Any]]) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Values of the fields of `LabelledSplit`, and of `ClassPixels` of each class, for some images."""
    totals: Counter[str] = Counter()
    classes: dict[str, Counter[str]] = {each: Counter() for each in names}
    one_label = LabelMaps({prompt_key(each): value for value, each in enumerate(names, 1)})
    for record in records:
        label_map = one_label.of_record(record)
        pixels = np.bincount(label_map.ravel(), minlength=IGNORE + 1)
        is_empty = not pixels[BACKGROUND + 1 : IGNORE].any()
        totals.update(
            num_images=1,
            num_pixels=label_map.size,
            num_background=int(pixels[BACKGROUND]),
            num_ignored=int(pixels[IGNORE]),
            num_empty_images=int(is_empty),
            num_boxes=sum(one["segmentation"] is None and not one["iscrowd"] for one in record["annotations"]),
        )
        shown = {prompt_key(one["category"]) for one in record["annotations"]}
        for value, each in enumerate(names, 1):
            if prompt_key(each) in shown:
                own = int((LabelMaps({prompt_key(each): 1}).of_record(record) == 1).sum())
                visible = int(pixels[value])
                classes[each].update(num_images=int(visible > 0), num_pixels=visible, num_hidden=own - visible)
    return totals, classes


def _sizes(index: CocoIndex) -> dict[str, Any]:
    sizes_hw = Counter(zip(index.table["height"].to_pylist(), index.table["width"].to_pylist(), strict=True))
    if not sizes_hw:
        return {}
    by_area = sorted(sizes_hw, key=lambda size_hw: (size_hw[0] * size_hw[1], size_hw))
    return {
        "num_sizes": len(sizes_hw),
        "smallest_hw": by_area[0],
        "largest_hw": by_area[-1],
        "commonest_hw": sizes_hw.most_common(1)[0][0],
    }
