"""A segmenter's reply as JSON, with masks in the form that was asked for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any

import cv2
from pycocotools import mask as coco_mask

from sam3lora.engine.detections import Instances
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_to_polygons
from serve_app.http.schemas import MaskFormat

_PNG_OPTIONS = [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 1]
_FEW = 16  # detections that take less time than a thread is worth


def is_quick(results: Sequence[Instances], masks: MaskFormat) -> bool:
    """Whether `encode_results` takes well under a millisecond."""
    return masks in ("rle", "none") and sum(len(found) for found in results) <= _FEW


def is_costly(masks: MaskFormat) -> bool:
    """Whether a mask may take a second, which one of a large image does when its pixels are drawn."""
    return masks in ("polygon", "png")


def encode_results(
    results: Sequence[Instances], masks: MaskFormat, *, is_over: Callable[[], bool] = lambda: False
) -> str:
    """The field `results` of a response as JSON text.

    Args:
        results: One for each prompt, with masks unless these are "none".
        masks: Their form.
        is_over: Whether nobody waits for it any more; asked before every mask.

    Raises:
        TimeoutError: It is over.
    """
    return json.dumps([_result(found, masks, is_over) for found in results], separators=(",", ":"))


def _result(found: Instances, masks: MaskFormat, is_over: Callable[[], bool]) -> dict[str, Any]:
    boxes = found.boxes_xyxy.tolist()
    detections: list[dict[str, Any]] = [
        {"score": round(score, 6), "box_xyxy": [round(value, 2) for value in box]}
        for score, box in zip(found.scores.tolist(), boxes, strict=True)
    ]
    if masks != "none":
        for detection, rle in zip(detections, found.masks, strict=True):
            if is_over():
                raise TimeoutError
            detection["area_px"] = rle_area_px(rle)
            detection["mask"] = _mask(rle, masks)
    return {
        "prompt": found.prompt,
        "presence": round(float(found.presence), 6),
        "num_detections": len(detections),
        "detections": detections,
    }


def _mask(rle: Rle, masks: MaskFormat) -> Rle | list[list[float]] | str:
    if masks == "polygon":
        return rle_to_polygons(rle)
    if masks == "png":
        return rle_to_png(rle)
    return {"size": list(rle["size"]), "counts": rle["counts"]}


def rle_to_png(rle: Rle) -> str:
    """Base64 of a PNG file with one bit a pixel, white where the mask is."""
    written, png = cv2.imencode(".png", coco_mask.decode(rle) * 255, _PNG_OPTIONS)
    assert written
    return base64.b64encode(png.tobytes()).decode("ascii")
