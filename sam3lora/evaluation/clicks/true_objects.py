"""The labelled objects of an image that a simulated user clicks on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pycocotools import mask as coco_mask

from sam3lora.data.masks import encode_mask_at
from sam3lora.data.prompts import prompt_key
from sam3lora.engine.mask_codes import Rle, rle_area_px
from sam3lora.evaluation.clicks.meter import is_measured
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory


@dataclass(frozen=True)
class TrueObject:
    """An object of an image: its number among the image's annotations, its category, and its mask."""

    number: int
    category: PromptedCategory
    rle: Rle


@dataclass(frozen=True)
class TrueObjects:
    """The objects of an image.

    Attributes:
        objects: Those to click on.
        ignored: The crowd regions of all categories; None if there is none.
        too_small: Numbers of the annotations that are too small to click on (`is_measured`).
        num_without_mask: Objects that have a box alone.
        num_crowds: Crowd regions.
    """

    objects: list[TrueObject]
    ignored: Rle | None
    too_small: list[int]
    num_without_mask: int
    num_crowds: int


def true_objects(record: Mapping[str, Any], categories: Sequence[PromptedCategory]) -> TrueObjects:
    """The objects of these categories in a record of an index."""
    category_of = {key: category for category in categories for key in category.name_keys}
    size_hw = (record["height"], record["width"])
    ignored = ignored_region(record)
    objects, too_small, num_without_mask = [], [], 0
    for number, annotation in enumerate(record["annotations"]):
        category = category_of.get(prompt_key(annotation["category"]))
        if category is None or annotation["iscrowd"]:
            continue
        rle = encode_mask_at(annotation["segmentation"], size_hw)
        if rle is None or not rle_area_px(rle):
            num_without_mask += 1
        elif not is_measured(rle, ignored):
            too_small.append(number)
        else:
            objects.append(TrueObject(number, category, rle))
    num_crowds = sum(bool(annotation["iscrowd"]) for annotation in record["annotations"])
    return TrueObjects(objects, ignored, too_small, num_without_mask, num_crowds)


def ignored_region(record: Mapping[str, Any]) -> Rle | None:
    """All crowd regions of a record together; None if there is none."""
    size_hw = (record["height"], record["width"])
    crowds = [encode_mask_at(one["segmentation"], size_hw) for one in record["annotations"] if one["iscrowd"]]
    masks = [rle for rle in crowds if rle is not None]
    return coco_mask.merge(masks) if masks else None
