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

from sam3lora.client import PromptResult

POINT_SIDE = 0.04  # of the image's shorter side: SAM 3 takes boxes, so a point becomes a small one
OUTLINE_TOLERANCE_PX = 1.0

XYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """The boxes that the annotator drew with a smart tool, with 1 (this) or 0 (not this), and the chosen label."""

    label: str
    boxes: list[tuple[XYXY, int]]

    @property
    def wanted_xyxy(self) -> list[XYXY]:
        return [xyxy for xyxy, label in self.boxes if label]


def read_drawn(context: Mapping[str, Any] | None) -> Drawn | None:
    """Key points and rectangles of an interactive request; None if it has none."""
    label, boxes = None, []
    for region in (context or {}).get("result") or ():
        kind, value = region.get("type", ""), region.get("value", {})
        if kind not in ("keypointlabels", "rectanglelabels"):
            continue
        xyxy = _to_pixels(kind, value, region["original_width"], region["original_height"])
        if xyxy[0] < xyxy[2] and xyxy[1] < xyxy[3]:
            boxes.append((xyxy, int(region.get("is_positive", True))))
            label = (value.get(kind) or value.get("labels") or [label])[0]
    return Drawn(label, boxes) if boxes and label else None


def mask_format(config: LabelConfig) -> str:
    """The form of masks that the control needs."""
    return {"brushlabels": "rle", "polygonlabels": "polygon", "rectanglelabels": "none"}[config.control]


def regions_of(
    result: PromptResult, label: str, config: LabelConfig, rows: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Label Studio's regions of all detections, or of some `rows`; a mask in several parts gives several polygons."""
    for row in range(result.num_detections) if rows is None else rows:
        for value in _values(result, row, config.control):
            yield _region(value, label, config, result.size_hw, float(result.scores[row]))


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


def _to_pixels(kind: str, value: Mapping[str, float], width: int, height: int) -> XYXY:
    """A box inside the image."""
    x0, y0 = value["x"] * width / 100, value["y"] * height / 100
    if kind == "rectanglelabels":
        x1, y1 = x0 + value["width"] * width / 100, y0 + value["height"] * height / 100
    else:
        half = POINT_SIDE * min(width, height) / 2
        x0, y0, x1, y1 = x0 - half, y0 - half, x0 + half, y0 + half
    return max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)


def _values(result: PromptResult, row: int, control: str) -> Iterator[dict[str, Any]]:
    height, width = result.size_hw
    if control == "brushlabels":
        yield {"format": "rle", "rle": encode_brush_rle(result.masks[row])}
    elif control == "polygonlabels":
        for outline in result.polygons[row]:
            # Outlines follow the edges of pixels: too many corners to edit by hand.
            corners = cv2.approxPolyDP(np.reshape(outline, (-1, 1, 2)).astype(np.float32), OUTLINE_TOLERANCE_PX, True)
            if len(corners) >= 3:
                points = corners.reshape(-1, 2) * (100 / width, 100 / height)
                yield {"points": points.tolist(), "closed": True}
    else:
        x0, y0, x1, y1 = result.boxes_xyxy[row].astype(float) * 100 / (width, height, width, height)
        yield {"x": float(x0), "y": float(y0), "width": float(x1 - x0), "height": float(y1 - y0), "rotation": 0}
