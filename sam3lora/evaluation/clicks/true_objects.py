"""The labelled objects of an image that a simulated user clicks on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.masks import decode_mask
from sam3lora.data.prompts import prompt_key
from sam3lora.evaluation.clicks.meter import is_measured
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory


@dataclass(frozen=True)
class TrueObject:
    """An object of an image: its number among the image's annotations, its category, and its mask as RLE."""

    number: int
    category: PromptedCategory
    rle: dict[str, Any]

    @property
    def mask_HW(self) -> np.ndarray:
        """bool, at the annotated size."""
        return coco_mask.decode(self.rle).astype(bool)


@dataclass(frozen=True)
class TrueObjects:
    """The objects of an image.

    Attributes:
        objects: Those to click on.
        ignored_HW: bool, the crowd regions of all categories.
        too_small: Numbers of the annotations that are too small to click on (`is_measured`).
        num_without_mask: Objects that have a box alone.
        num_crowds: Crowd regions.
    """

    objects: list[TrueObject]
    ignored_HW: np.ndarray
    too_small: list[int]
    num_without_mask: int
    num_crowds: int


def true_objects(record: Mapping[str, Any], categories: Sequence[PromptedCategory]) -> TrueObjects:
    """The objects of these categories in a record of an index."""
    category_of = {key: category for category in categories for key in category.name_keys}
    size_hw = (record["height"], record["width"])
    ignored_HW = np.zeros(size_hw, dtype=bool)
    crowds = [one for one in record["annotations"] if one["iscrowd"]]
    for annotation in crowds:
        ignored_HW |= decode_mask(annotation["segmentation"], size_hw)
    objects, too_small, num_without_mask = [], [], 0
    for number, annotation in enumerate(record["annotations"]):
        category = category_of.get(prompt_key(annotation["category"]))
        if category is None or annotation["iscrowd"]:
            continue
        mask_HW = decode_mask(annotation["segmentation"], size_hw)
        if not mask_HW.any():
            num_without_mask += 1
        elif not is_measured(mask_HW, ignored_HW):
            too_small.append(number)
        else:
            rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
            objects.append(TrueObject(number, category, rle))
    return TrueObjects(objects, ignored_HW, too_small, num_without_mask, len(crowds))
