"""Responses of the service as arrays."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""Compressed COCO RLE `{"size": [height, width], "counts": str}`."""


@dataclass(frozen=True, eq=False)
class PromptResult:
    """Detections of one prompt, by descending score; reads like the result of a `Predictor`.

    Attributes:
        presence: Probability in [0, 1] that the image shows the prompt at all.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the image.
        areas_px: int64 (N,), pixels of each mask; None without masks.
        size_hw: Height and width of the image in pixels.
        mask_format: "rle", "polygon", "png" or "none", as requested.
        mask_ids: For each detection the id of its mask, for `refine`; None without `keep_masks`, and where the
            service had no room for it.
    """

    prompt: str
    presence: float
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    areas_px: np.ndarray | None
    size_hw: tuple[int, int]
    mask_format: str
    _masks: list[Any] = field(repr=False)
    mask_ids: tuple[str | None, ...] = ()

    @classmethod
    def from_json(cls, result: Mapping[str, Any], size_hw: tuple[int, int], mask_format: str) -> PromptResult:
        found = result["detections"]
        with_masks = mask_format != "none"
        return cls(
            prompt=result["prompt"],
            presence=float(result["presence"]),
            scores=np.array([one["score"] for one in found], dtype=np.float32),
            boxes_xyxy=np.array([one["box_xyxy"] for one in found], dtype=np.float32).reshape(-1, 4),
            areas_px=np.array([one["area_px"] for one in found], dtype=np.int64) if with_masks else None,
            size_hw=size_hw,
            mask_format=mask_format,
            _masks=[one["mask"] for one in found] if with_masks else [],
            mask_ids=tuple(one.get("mask_id") for one in found),
        )

    @property
    def num_detections(self) -> int:
        return len(self.scores)

    @property
    def rles(self) -> list[Rle]:
        """N compressed COCO RLEs, of an answer with `masks="rle"`."""
        return self._masks_as("rle")

    @property
    def polygons(self) -> list[list[list[float]]]:
        """For each detection its outlines `[x0, y0, x1, y1, ...]` in pixels, of an answer with `masks="polygon"`."""
        return self._masks_as("polygon")

    @cached_property
    def masks(self) -> np.ndarray:
        """bool (N, H, W), decoded when first asked for: a byte a pixel of each detection; not of polygons."""
        masks_NHW = np.zeros((self.num_detections, *self.size_hw), dtype=bool)
        form = "png" if self.mask_format == "png" else "rle"
        for row, mask in enumerate(self._masks_as(form)):
            masks_NHW[row] = decode_mask(mask, self.size_hw, form)
        return masks_NHW

    def _masks_as(self, wanted: str) -> list[Any]:
        if self.mask_format != wanted:
            raise ValueError(f"the masks came as {self.mask_format!r}: call with masks={wanted!r}")
        return self._masks


@dataclass(frozen=True, eq=False)
class SegmentResults(Sequence[PromptResult]):
    """One `PromptResult` for each prompt, in the order of the prompts.

    Attributes:
        request_id: Id of the call in the service's log.
        size_hw: Height and width of the image in pixels.
        adapter: The adapter that answered; None for the base model.
        timing_ms: Milliseconds in the service by stage, and "total".
    """

    request_id: str
    size_hw: tuple[int, int]
    adapter: str | None
    timing_ms: dict[str, float]
    _results: tuple[PromptResult, ...]

    @classmethod
    def from_json(cls, answer: Mapping[str, Any], mask_format: str) -> SegmentResults:
        size_hw = (int(answer["image"]["height"]), int(answer["image"]["width"]))
        results = tuple(PromptResult.from_json(result, size_hw, mask_format) for result in answer["results"])
        return cls(answer["request_id"], size_hw, answer["adapter"], dict(answer["timing_ms"]), results)

    @overload
    def __getitem__(self, index: int) -> PromptResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptResult]: ...
    def __getitem__(self, index: int | slice) -> PromptResult | Sequence[PromptResult]:
        return self._results[index]

    def __len__(self) -> int:
        return len(self._results)


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter of the service.

    Attributes:
        id: What to give as `adapter`, or of task "clicks" as `click_adapter`.
        task: "detection" for `segment`, "dense" for `dense`, "clicks" for `refine`; None if the adapter cannot be read.
        prompts: Those it was trained with.
        classes: Of task "dense": those of a pixel.
        rank: Of its LoRA matrices.
        size_bytes: Of its weights.
        adapts: Components of the model that it changes.
        clicks_vision: Of task "clicks": the vision trunk that it goes with, "base" for that of the base: ask with
            `clicks_vision="base"`, or with no adapter that changes the trunk; "adapter" for that of an adapter: ask
            with one of `vision_adapters`.
        vision_adapters: Of task "clicks" with clicks_vision "adapter": what to give as `adapter`.
        post_processing: Settings that hold where a call gives none, by the names of `SegmentOptions`, and
            `prompt_thresholds`; None for other tasks than "detection", or if the adapter cannot be read.
        resident: Whether a replica has it in memory.
        error: Why it cannot be served; None if it can.
    """

    id: str
    prompts: tuple[str, ...] = ()
    rank: int | None = None
    size_bytes: int | None = None
    adapts: tuple[str, ...] = ()
    post_processing: Mapping[str, Any] | None = None
    resident: bool = False
    error: str | None = None
    task: str | None = None
    classes: tuple[str, ...] = ()
    clicks_vision: str | None = None
    vision_adapters: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, adapter: Mapping[str, Any]) -> AdapterInfo:
        return cls(
            id=adapter["id"],
            prompts=tuple(adapter.get("prompts") or ()),
            rank=adapter.get("rank"),
            size_bytes=adapter.get("size_bytes"),
            adapts=tuple(adapter.get("adapts") or ()),
            post_processing=adapter.get("post_processing"),
            resident=bool(adapter.get("resident")),
            error=adapter.get("error"),
            task=adapter.get("task"),
            classes=tuple(adapter.get("classes") or ()),
            clicks_vision=adapter.get("clicks_vision"),
            vision_adapters=tuple(adapter.get("vision_adapters") or ()),
        )


def decode_rle(rle: Rle, size_hw: tuple[int, int]) -> np.ndarray:
    """bool (H, W); a ValueError if it is the mask of an image of another size."""
    if tuple(rle["size"]) != size_hw:
        raise ValueError(f"expected a mask of {size_hw}, got {tuple(rle['size'])}")
    return coco_mask.decode(rle).astype(bool)


def decode_mask(mask: Any, size_hw: tuple[int, int], form: str) -> np.ndarray:
    """bool (H, W) of a mask in the form "rle" or "png"."""
    return _decode_png(mask, size_hw) if form == "png" else decode_rle(mask, size_hw)


def _decode_png(text: str, size_hw: tuple[int, int]) -> np.ndarray:
    mask_HW = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L")) > 0
    if mask_HW.shape != size_hw:
        raise ValueError(f"expected a mask of {size_hw}, got {mask_HW.shape}")
    return mask_HW
