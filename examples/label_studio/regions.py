"""Conversion between Label Studio's regions, in percent of the image, and the service's detections, in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
from brush_rle import encode_brush_rle
from label_config import LabelConfig

from sam3lora.client import PromptResult, RefinedObject

POINT_SIDE = 0.04  # of the image's shorter side: of the box that a point becomes where the service answers no clicks
OUTLINE_TOLERANCE_PX = 1.0

XYXY = tuple[float, float, float, float]
Point = tuple[float, float, int]


@dataclass(frozen=True)
class Drawn:
    """What the annotator drew with a smart tool, in pixels, and the chosen label.

    Attributes:
        clicks: x, y and 1 (this) or 0 (not this).
        boxes: With 1 or 0 likewise.
    """

    label: str
    size_hw: tuple[int, int]
    clicks: list[Point]
    boxes: list[tuple[XYXY, int]]

    def as_object(self) -> dict[str, Any]:
        """For `Client.refine`: the last box around the object, and the clicks. A box of 0 is a click in its middle."""
        outside = [((x0 + x1) / 2, (y0 + y1) / 2, 0) for (x0, y0, x1, y1), label in self.boxes if not label]
        around = [xyxy for xyxy, label in self.boxes if label]
        return {"clicks": [*self.clicks, *outside], "box": around[-1] if around else None}

    def as_examples(self) -> list[tuple[XYXY, int]]:
        """Boxes for `Client.segment`: a click becomes a small one."""
        return [*((_around(x, y, self.size_hw), label) for x, y, label in self.clicks), *self.boxes]


def read_drawn(context: Mapping[str, Any] | None) -> Drawn | None:
    """Key points and rectangles of an interactive request; None if it has none."""
    label, size_hw = None, (0, 0)
    clicks: list[Point] = []
    boxes: list[tuple[XYXY, int]] = []
    for region in (context or {}).get("result") or ():
        kind, value = region.get("type", ""), region.get("value", {})
        if kind not in ("keypointlabels", "rectanglelabels"):
            continue
        width, height = region["original_width"], region["original_height"]
        x, y = value["x"] * width / 100, value["y"] * height / 100
        is_positive = int(region.get("is_positive", True))
        if kind == "keypointlabels":
            clicks.append((_inside(x, width), _inside(y, height), is_positive))
        else:
            right, bottom = x + value["width"] * width / 100, y + value["height"] * height / 100
            xyxy = max(0.0, x), max(0.0, y), min(float(width), right), min(float(height), bottom)
            if not (xyxy[0] < xyxy[2] and xyxy[1] < xyxy[3]):
                continue
            boxes.append((xyxy, is_positive))
        size_hw = height, width
        label = (value.get(kind) or value.get("labels") or [label])[0]
    return Drawn(label, size_hw, clicks, boxes) if label and (clicks or boxes) else None


def mask_format(config: LabelConfig) -> str:
    """The form of masks that the control needs."""
    return {"brushlabels": "rle", "polygonlabels": "polygon", "rectanglelabels": "none"}[config.control]


def regions_of(
    result: PromptResult, label: str, config: LabelConfig, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Label Studio's regions of all detections, or of some `rows`; a mask in several parts gives several polygons."""
    for row in range(result.num_detections) if rows is None else rows:
        mask_HW = result.masks[row] if config.control == "brushlabels" else None
        outlines = result.polygons[row] if config.control == "polygonlabels" else ()
        for value in _values(mask_HW, outlines, result.boxes_xyxy[row], result.size_hw):
            yield _region(value, label, config, result.size_hw, float(result.scores[row]))


def regions_of_object(found: RefinedObject, label: str, config: LabelConfig) -> Iterator[dict[str, Any]]:
    """Label Studio's regions of a clicked object; none if its mask is empty."""
    if not found.area_px:
        return
    mask_HW = found.mask if config.control == "brushlabels" else None
    outlines = found.polygons if config.control == "polygonlabels" else ()
    for value in _values(mask_HW, outlines, np.array(found.box_xyxy), found.size_hw):
        yield _region(value, label, config, found.size_hw, found.score)


def brush_region(mask_HW: np.ndarray, label: str, config: LabelConfig) -> dict[str, Any]:
    """The region of a class of pixels, bool (H, W), for a control of brush labels."""
    value = {"format": "rle", "rle": encode_brush_rle(mask_HW)}
    return _region(value, label, config, mask_HW.shape, 1.0)


def rows_under(boxes_xyxy: np.ndarray, wanted_xyxy: Sequence[XYXY]) -> list[int]:
    """For each wanted box the detection that fits it best (IoU), if any touches it; each once."""
    rows: list[int] = []
    for x0, y0, x1, y1 in wanted_xyxy:
        low, high = np.maximum(boxes_xyxy[:, :2], (x0, y0)), np.minimum(boxes_xyxy[:, 2:], (x1, y1))
        shared = np.clip(high - low, 0, None).prod(axis=1)
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
        iou = shared / np.maximum(areas + (x1 - x0) * (y1 - y0) - shared, 1e-9)
        if iou.size and iou.max() > 0 and (best := int(iou.argmax())) not in rows:
            rows.append(best)
    return rows


def _region(
    value: Mapping[str, Any], label: str, config: LabelConfig, size_hw: tuple[int, ...], score: float
) -> dict[str, Any]:
    height, width = size_hw
    return {
        "id": uuid4().hex[:10],
        "type": config.control,
        "from_name": config.from_name,
        "to_name": config.to_name,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": score,
        "value": {**value, config.control: [label]},
    }


def _inside(place: float, side: int) -> float:
    """A coordinate of a pixel of the image: percents may lead to its right or lower edge, or a little beyond."""
    return min(max(0.0, place), side - 0.5)


def _around(x: float, y: float, size_hw: tuple[int, int]) -> XYXY:
    """A small box inside the image."""
    height, width = size_hw
    half = POINT_SIDE * min(width, height) / 2
    return max(0.0, x - half), max(0.0, y - half), min(float(width), x + half), min(float(height), y + half)


def _values(
    mask_HW: np.ndarray | None, outlines: Sequence[Sequence[float]], box_xyxy: np.ndarray, size_hw: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """The value of a brush, or of polygons, or else of a rectangle."""
    height, width = size_hw
    if mask_HW is not None:
        yield {"format": "rle", "rle": encode_brush_rle(mask_HW)}
    elif outlines:
        for outline in outlines:
            # Outlines follow the edges of pixels: too many corners to edit by hand.
            corners = cv2.approxPolyDP(np.reshape(outline, (-1, 1, 2)).astype(np.float32), OUTLINE_TOLERANCE_PX, True)
            if len(corners) >= 3:
                points = corners.reshape(-1, 2) * (100 / width, 100 / height)
                yield {"points": points.tolist(), "closed": True}
    else:
        x0, y0, x1, y1 = box_xyxy.astype(float) * 100 / (width, height, width, height)
        yield {"x": float(x0), "y": float(y0), "width": float(x1 - x0), "height": float(y1 - y0), "rotation": 0}
