"""Label maps: the value of each pixel of an image, painted from its labelled objects.

Where objects overlap, the smaller one is on top. `IGNORE` pixels are not to be learned from: crowd regions, boxes of
objects without a mask, and what lies beside an image in its frame. A void region (`sam3lora.data.void`) is ignored in
all maps, a crowd region in that of its category.

Shapes: `N` maps of an image, `H` `W` pixels, `M` the side of a map in the model's frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3lora.data.augment import Placement
from sam3lora.data.masks import Segmentation, decode_mask, mask_area, place_mask
from sam3lora.data.prompts import prompt_key
from sam3lora.data.void import is_void
from sam3lora.label_values import IGNORE

MOST_CLASSES = IGNORE - 1


@dataclass(frozen=True)
class LabelMaps:
    """Which value a category has in label maps.

    Args:
        values: Key of a category name (`prompt_key`) -> value from 1. Other categories are background, 0.
        overlapping: Each value has a map of its own, of 0 and 1, instead of one map with all values.
    """

    values: Mapping[str, int]
    overlapping: bool = False

    @property
    def num_maps(self) -> int:
        return max(self.values.values()) if self.overlapping else 1

    def placed(self, record: Mapping[str, Any], placement: Placement, side: int) -> np.ndarray:
        """uint8 (N, M, M) of a record of an index in the model's frame."""
        size_hw = record["height"], record["width"]
        maps = self._paint(record, (side, side), lambda each: place_mask(each, size_hw, placement, side))
        if not placement.is_full_frame:
            height, width = size_hw
            whole: Segmentation = [[0, 0, width, 0, width, height, 0, height]]
            inside = place_mask(whole, size_hw, placement, side)
            assert inside is not None
            maps[:, ~inside] = IGNORE
        return maps

    def of_record(self, record: Mapping[str, Any], size_hw: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 (N, H, W) of a record at the size of its image, or at another one."""
        own_hw = record["height"], record["width"]
        if size_hw is None or tuple(size_hw) == own_hw:
            return self._paint(record, own_hw, lambda each: decode_mask(each, own_hw) if each else None)
        maps = self.of_record(record)
        import cv2

        resized = [cv2.resize(one, size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT) for one in maps]
        return np.stack(resized)

    def _paint(
        self,
        record: Mapping[str, Any],
        size_hw: tuple[int, int],
        draw: Callable[[Segmentation], np.ndarray | None],
    ) -> np.ndarray:
        maps = np.zeros((self.num_maps, *size_hw), dtype=np.uint8)
        own_hw = record["height"], record["width"]
        for annotation in sorted(record["annotations"], key=lambda one: _order(one, own_hw)):
            value = self.values.get(prompt_key(annotation["category"]))
            if value is None and not is_void(annotation):
                continue
            mask, is_ignored = draw(annotation["segmentation"]), annotation["iscrowd"]
            if mask is None:
                mask, is_ignored = draw(_corners(annotation["bbox_xywh"])), True
            assert mask is not None
            if value is None:
                maps[:, mask] = IGNORE
            else:
                number, painted = (value - 1, 1) if self.overlapping else (0, value)
                maps[number, mask] = IGNORE if is_ignored else painted
        return maps


def _order(annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> tuple[bool, int]:
    """Ignored regions first, then the largest objects first, at the size of the image: the same order at every size."""
    is_object = annotation["segmentation"] is not None and not annotation["iscrowd"]
    return is_object, -mask_area(annotation["segmentation"], size_hw) if is_object else 0


def _corners(box_xywh: Sequence[float]) -> Segmentation:
    x, y, width, height = box_xywh
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]
