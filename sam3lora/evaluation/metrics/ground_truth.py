"""The prompts of a split, and its ground truth: masks as RLE at the annotated size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.coco import CocoIndex
from sam3lora.data.masks import encode_mask_at
from sam3lora.data.prompts import prompt_key


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


def incomplete_categories(
    categories: Sequence[PromptedCategory], exhaustive: bool | Sequence[str], negative_prompts: Sequence[str] = ()
) -> frozenset[int]:
    """Ids of the categories of which images may show objects without a label.

    `exhaustive` is True or False for all, or has the names of the categories whose objects are all annotated.
    `negative_prompts` are known to be absent everywhere.
    """
    if exhaustive is True:
        return frozenset()
    complete = {prompt_key(name) for name in [*(exhaustive or ()), *negative_prompts]}
    return frozenset(category.id for category in categories if not category.name_keys <= complete)


@dataclass(frozen=True)
class SplitTruth:
    """What is to be found in a split: read for one image at a time, because masks take much memory.

    Attributes:
        index: The images and their annotations.
        categories: What is asked; annotations of other categories are left out.
    """

    index: CocoIndex
    categories: Sequence[PromptedCategory]

    @cached_property
    def image_ids(self) -> list[int]:
        return self.index.table.column("image_id").to_pylist()

    @cached_property
    def row_of(self) -> dict[int, int]:
        """Image id -> row of the index."""
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    @cached_property
    def sizes_hw(self) -> list[tuple[int, int]]:
        """Height and width of each image in pixels."""
        columns = (self.index.table.column(name).to_pylist() for name in ("height", "width"))
        return list(zip(*columns, strict=True))

    def annotations_of(self, image_id: int) -> list[dict[str, Any]]:
        """COCO annotations of one image, as of `annotations_of_record`."""
        return annotations_of_record(self.index.record(self.row_of[image_id]), self.categories)

    def annotations(self) -> Iterator[dict[str, Any]]:
        """COCO annotations of all images, in their order."""
        for row in range(len(self.index)):
            yield from annotations_of_record(self.index.record(row), self.categories)

    def to_coco(self) -> dict[str, Any]:
        """A COCO dict with the ids of images and categories of the file: all masks of the split in memory."""
        columns = self.index.table.select(["image_id", "file_name", "height", "width"])
        images = columns.rename_columns(["id", "file_name", "height", "width"]).to_pylist()
        annotations = [{"id": number} | entry for number, entry in enumerate(self.annotations(), start=1)]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def annotations_of_record(record: Mapping[str, Any], categories: Sequence[PromptedCategory]) -> list[dict[str, Any]]:
    """COCO annotations of one record of an index, with compressed RLE, for the asked categories.

    An object with a box and no mask (`is_box_only`) becomes a crowd region of its box, so that a detection in it is
    neither right nor wrong. Where boxes are compared it is an object.
    """
    id_of = {key: category.id for category in categories for key in category.name_keys}
    size_hw = (record["height"], record["width"])
    found = []
    for annotation in record["annotations"]:
        category_id = id_of.get(prompt_key(annotation["category"]))
        if category_id is None:
            continue
        rle = encode_mask_at(annotation["segmentation"], size_hw)
        has_mask = rle is not None and coco_mask.area(rle) > 0
        if rle is None or not has_mask:
            rle = _filled_box(annotation["bbox_xywh"], size_hw)
        found.append(
            {
                "image_id": record["image_id"],
                "category_id": category_id,
                "segmentation": {"size": list(size_hw), "counts": rle["counts"].decode("ascii")},
                "bbox": list(annotation["bbox_xywh"]),
                "area": int(coco_mask.area(rle)),
                "iscrowd": int(annotation["iscrowd"] or not has_mask),
                "is_box_only": int(not annotation["iscrowd"] and not has_mask),
            }
        )
    return found


def _filled_box(box_xywh: Sequence[float], size_hw: tuple[int, int]) -> dict[str, Any]:
    x, y, width, height = box_xywh
    mask = np.zeros(size_hw, dtype=np.uint8, order="F")
    mask[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = 1
    return coco_mask.encode(mask)
