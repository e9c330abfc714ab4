"""The prompts of a split, and its ground truth: masks as RLE at the annotated size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.coco import CocoIndex
from sam3lora.data.masks import decode_mask
from sam3lora.data.prompts import prompt_key

PresenceTable = dict[tuple[int, int], bool | None]


class SplitTruth(NamedTuple):
    """The ground truth of a split.

    Attributes:
        coco: COCO dict with the ids of images and categories of the file, and masks as compressed RLE.
        presence: (image id, category id) -> True if there is an object, None if there are only crowd regions; absent
            categories are left out.
        num_without_mask: Number of objects that have only a box.
    """

    coco: dict[str, Any]
    presence: PresenceTable
    num_without_mask: int


@dataclass
class PromptedCategory:
    """A prompt and its category. Categories with the same prompt are one category to the model and to the metrics.

    Attributes:
        id: COCO category id of the results: the file's own, or a new one for a name that the file lacks.
        name: Name of the first category with this prompt.
        name_keys: `prompt_key` of the names of all categories with this prompt.
    """

    id: int
    name: str
    prompt: str
    name_keys: set[str] = field(default_factory=set)


def prompted_categories(
    index: CocoIndex, names: Sequence[str] | None = None, prompts: Mapping[str, str] | None = None
) -> list[PromptedCategory]:
    """The distinct prompts of a split's categories, or of those named; `prompts` is name -> prompt if they differ."""
    prompt_of = {prompt_key(name): prompt for name, prompt in (prompts or {}).items()}
    known: dict[str, int] = {}
    for id_, name in [*index.category_names.items(), *index.listed_names.items()]:
        known.setdefault(prompt_key(name), id_)
    next_id = max(known.values(), default=0) + 1
    found: dict[str, PromptedCategory] = {}
    for name in index.names if names is None else names:
        prompt = prompt_of.get(prompt_key(name), name)
        if prompt_key(prompt) not in found:
            if prompt_key(name) not in known:
                known[prompt_key(name)], next_id = next_id, next_id + 1
            found[prompt_key(prompt)] = PromptedCategory(known[prompt_key(name)], name, prompt)
        found[prompt_key(prompt)].name_keys.add(prompt_key(name))
    return list(found.values())


def build_ground_truth(index: CocoIndex, categories: Sequence[PromptedCategory]) -> SplitTruth:
    """The annotations of the asked categories, for `coco_map`.

    An object with a box and no mask (`is_box_only`) becomes a crowd region of its box, so that a detection in it is
    neither right nor wrong. Where boxes are compared it is an object.
    """
    id_of = {key: category.id for category in categories for key in category.name_keys}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    presence: PresenceTable = {}
    num_without_mask = 0
    for row in range(len(index)):
        record = index.record(row)
        size_hw = (record["height"], record["width"])
        images.append(
            {key: record[key] for key in ("file_name", "path", "height", "width")} | {"id": record["image_id"]}
        )
        for annotation in record["annotations"]:
            category_id = id_of.get(prompt_key(annotation["category"]))
            if category_id is None:
                continue
            pair = (record["image_id"], category_id)
            presence[pair] = True if presence.get(pair) or not annotation["iscrowd"] else None
            mask = decode_mask(annotation["segmentation"], size_hw)
            has_mask = bool(mask.any())
            if not has_mask:
                num_without_mask += not annotation["iscrowd"]
                mask = _filled_box(annotation["bbox_xywh"], size_hw)
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": category_id,
                    "segmentation": {"size": list(size_hw), "counts": rle["counts"].decode("ascii")},
                    "bbox": list(annotation["bbox_xywh"]),
                    "area": int(mask.sum()),
                    "iscrowd": int(annotation["iscrowd"] or not has_mask),
                    "is_box_only": int(not annotation["iscrowd"] and not has_mask),
                }
            )
    listed = [{"id": category.id, "name": category.name, "prompt": category.prompt} for category in categories]
    coco = {"images": images, "annotations": annotations, "categories": listed}
    return SplitTruth(coco, presence, num_without_mask)


def _filled_box(box_xywh: Sequence[float], size_hw: tuple[int, int]) -> np.ndarray:
    x, y, width, height = box_xywh
    mask = np.zeros(size_hw, dtype=bool)
    mask[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = True
    return mask
