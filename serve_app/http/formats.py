"""Detections of the model as response bodies, with masks in the form that was asked for."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.engine.detections import Detections
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_to_polygons
from serve_app.http.errors import ServeError
from serve_app.http.schemas import (
    DetectionResponse,
    ImageSize,
    MaskFormat,
    PromptResponse,
    RleMask,
    SegmentRequest,
    SegmentResponse,
)
from serve_app.http.writing import Writing
from serve_app.messages import SegmentReply

_PNG_OPTIONS = [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 1]
_FEW = 16  # detections that take less time than a thread is worth


def is_quick(results: Sequence[Detections], masks: MaskFormat) -> bool:
    """Whether formatting takes well under a millisecond."""
    return masks in ("rle", "none") and sum(len(found) for found in results) <= _FEW


def is_costly(masks: MaskFormat) -> bool:
    """Whether one mask may take a second: the pixels of a large image are drawn."""
    return masks in ("polygon", "png")


def prompt_response(
    found: Detections,
    masks: MaskFormat,
    mask_ids: Sequence[str | None] | None = None,
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> PromptResponse:
    """The response body of one prompt; `mask_ids` are those of kept masks. `is_over` is asked before every mask.

    Raises:
        ServeError: A number is not finite: JSON has no word for it.
        TimeoutError: It is over: nobody waits for the response any more.
    """
    if not (math.isfinite(found.presence) and np.isfinite(found.scores).all() and np.isfinite(found.boxes_xyxy).all()):
        raise ServeError("internal", "the model's answer holds numbers that are not finite")
    # model_construct: the values are our own and need no validation.
    detections = [
        DetectionResponse.model_construct(score=round(score, 6), box_xyxy=[round(value, 2) for value in box])
        for score, box in zip(found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
    ]
    if masks != "none":
        for detection, rle in zip(detections, found.rles or (), strict=True):
            if is_over():
                raise TimeoutError
            detection.area_px = rle_area_px(rle)
            detection.mask = mask_as(masks, rle)
    if mask_ids is not None:
        for detection, mask_id in zip(detections, mask_ids, strict=True):
            detection.mask_id = mask_id
    return PromptResponse.model_construct(
        prompt=found.prompt,
        presence=round(float(found.presence), 6),
        num_detections=len(detections),
        detections=detections,
    )


def segment_response(reply: SegmentReply, request: SegmentRequest, writing: Writing) -> SegmentResponse:
    """The response body; without masks a detection has neither `mask` nor `area_px`.

    Raises:
        ServeError, TimeoutError: As `prompt_response`.
    """
    ids: Sequence[Sequence[str | None] | None] = [None] * len(reply.results)
    if reply.mask_ids is not None:
        ids = reply.mask_ids
    results = [
        prompt_response(found, request.masks, of_prompt, is_over=writing.is_over)
        for found, of_prompt in zip(reply.results, ids, strict=True)
    ]
    writing.clock.lap("format")
    height, width = reply.size_hw
    return SegmentResponse.model_construct(
        request_id=writing.request_id,
        image=ImageSize(width=width, height=height),
        adapter=request.adapter,
        results=results,
        timing_ms=writing.clock.with_total(reply.timing_ms),
    )


def mask_as(masks: MaskFormat, rle: Rle) -> RleMask | list[list[float]] | str:
    """A mask in the form that a request asks for, which is not "none"."""
    if masks == "polygon":
        return rle_to_polygons(rle)
    if masks == "png":
        return rle_to_png(rle)
    return RleMask.model_construct(size=list(rle["size"]), counts=rle["counts"])


def rle_to_png(rle: Rle) -> str:
    """Base64 of a PNG file with one bit a pixel, white where the mask is."""
    written, png = cv2.imencode(".png", coco_mask.decode(rle) * 255, _PNG_OPTIONS)
    assert written
    return base64.b64encode(png.tobytes()).decode("ascii")
