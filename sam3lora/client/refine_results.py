"""Responses of the service about clicked objects, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sam3lora.client.segment_results import Rle, decode_mask


@dataclass(frozen=True, eq=False)
class RefinedMask:
    """A mask of an object.

    Attributes:
        score: The IoU with the object that the model expects, in [0, 1].
        box_xyxy: Tight box in pixels; zeros for an empty mask.
        area_px: Pixels of the mask.
        mask_id: What to start the next call from; None if the service had no room for it.
        size_hw: Height and width of the image in pixels.
        mask_format: "rle", "polygon", "png" or "none", as requested.
    """

    score: float
    box_xyxy: tuple[float, float, float, float]
    area_px: int
    mask_id: str | None
    size_hw: tuple[int, int]
    mask_format: str
    _mask: Any = field(repr=False)

    @property
    def rle(self) -> Rle:
        """Compressed COCO RLE, of an answer with `masks="rle"`."""
        return self._mask_as("rle")

    @property
    def polygons(self) -> list[list[float]]:
        """Outlines `[x0, y0, x1, y1, ...]` in pixels, of an answer with `masks="polygon"`."""
        return self._mask_as("polygon")

    @cached_property
    def mask(self) -> np.ndarray:
        """bool (H, W), decoded when first asked for; not of polygons."""
        form = "png" if self.mask_format == "png" else "rle"
        return decode_mask(self._mask_as(form), self.size_hw, form)

    def _mask_as(self, wanted: str) -> Any:
        if self.mask_format != wanted:
            raise ValueError(f"the mask came as {self.mask_format!r}: call with masks={wanted!r}")
        return self._mask


@dataclass(frozen=True, eq=False)
class RefinedObject(RefinedMask):
    """An object: the mask of the highest score, and the others.

    Attributes:
        object_score: Probability in [0, 1] that there is an object.
        alternatives: By descending score; empty if one mask was asked for.
    """

    object_score: float
    alternatives: tuple[RefinedMask, ...]


@dataclass(frozen=True, eq=False)
class RefineResults(Sequence[RefinedObject]):
    """One `RefinedObject` for each object of the call, in its order.

    Attributes:
        request_id: Id of the call in the service's log.
        size_hw: Height and width of the image in pixels.
        adapter: The adapter whose trunk was seen; None for the base model.
        click_adapter: The adapter whose click head answered; None for the base model's.
        timing_ms: Milliseconds in the service by stage, and "total".
    """

    request_id: str
    size_hw: tuple[int, int]
    adapter: str | None
    click_adapter: str | None
    timing_ms: dict[str, float]
    _objects: tuple[RefinedObject, ...]

    @classmethod
    def from_json(cls, answer: Mapping[str, Any], mask_format: str) -> RefineResults:
        size_hw = (int(answer["image"]["height"]), int(answer["image"]["width"]))

        def fields(one: Mapping[str, Any]) -> dict[str, Any]:
            x0, y0, x1, y1 = (float(value) for value in one["box_xyxy"])
            return {
                "score": float(one["score"]),
                "box_xyxy": (x0, y0, x1, y1),
                "area_px": int(one["area_px"]),
                "mask_id": one["mask_id"],
                "size_hw": size_hw,
                "mask_format": mask_format,
                "_mask": one.get("mask"),
            }

        objects = tuple(
            RefinedObject(
                **fields(one),
                object_score=float(one["object_score"]),
                alternatives=tuple(RefinedMask(**fields(other)) for other in one["alternatives"]),
            )
            for one in answer["objects"]
        )
        adapters = answer["adapter"], answer.get("click_adapter")  # which earlier services do not answer
        return cls(answer["request_id"], size_hw, *adapters, dict(answer["timing_ms"]), objects)

    def __getitem__(self, index: Any) -> Any:
        return self._objects[index]

    def __len__(self) -> int:
        return len(self._objects)
