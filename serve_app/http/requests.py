"""Checks of a request as a whole: its fields together, its image, and the call that a replica gets."""

from __future__ import annotations

import base64
import binascii
import hashlib

from sam3lora.engine.detections import BoxPrompt
from serve_app.http.body import Received
from serve_app.http.errors import ServeError
from serve_app.http.image_header import read_header
from serve_app.http.schemas import ImageUpload, SegmentRequest, check, check_boxes, check_prompts
from serve_app.messages import ImageFile, SegmentCall
from serve_app.settings import Limits

IMAGE_ID_PREFIX = "img_"


def check_segment(received: Received, limits: Limits) -> tuple[SegmentRequest, ImageFile]:
    """The request and its image. Reads the image's header and hashes the file, which takes milliseconds: use a thread.

    Boxes in an uploaded image are checked by the replica, which knows its size.

    Raises:
        ServeError: The first fault.
    """
    request: SegmentRequest = check(SegmentRequest, received.fields)
    check_prompts(request.prompts, max_prompts=limits.max_prompts, max_chars=limits.max_prompt_chars)
    if len(request.boxes) > limits.max_boxes:
        message = f"expected at most {limits.max_boxes} boxes, got {len(request.boxes)}"
        raise ServeError("invalid_box", message, field="boxes")
    if not request.prompts and not any(box.label for box in request.boxes):
        message = "nothing to look for: expected prompts, or a box with label 1"
        raise ServeError("invalid_request", message, field="prompts")
    if request.max_detections is not None and request.max_detections > limits.max_detections:
        message = f"max_detections must be at most {limits.max_detections}"
        raise ServeError("invalid_request", message, field="max_detections")

    image, size_hw = find_image(received.image, request.image_base64, request.image_id, limits)
    if size_hw is not None:
        check_boxes(_boxes(request), size_hw)
    return request, image


def find_image(
    file: bytes | None, image_base64: str | None, image_id: str | None, limits: Limits
) -> tuple[ImageFile, tuple[int, int] | None]:
    """The image of a request, in whatever form it came, and its size (height, width); None for an uploaded one.

    Raises:
        ServeError: There is none or more than one, or it is refused.
    """
    if sum(source is not None for source in (file, image_base64, image_id)) != 1:
        message = "expected one image: a file, image_base64 or image_id, and only one of them"
        raise ServeError("invalid_request", message, field="image")
    if image_id is not None:
        return ImageFile(image_id.removeprefix(IMAGE_ID_PREFIX)), None
    return check_image(file if file is not None else decode_base64(image_base64 or ""), limits)


def check_upload(received: Received, limits: Limits) -> ImageFile:
    """The image of an upload; a ServeError if there is none, or it is refused."""
    if received.image is not None:
        if received.fields:
            raise ServeError("invalid_request", "expected an image alone: prompts are asked with POST /v1/segment")
        return check_image(received.image, limits)[0]
    upload: ImageUpload = check(ImageUpload, received.fields)
    return check_image(decode_base64(upload.image_base64), limits)[0]


def check_image(data: bytes, limits: Limits) -> tuple[ImageFile, tuple[int, int]]:
    """Read the header of an image file and hash the file; returns it with its size (height, width)."""
    header = read_header(data, formats=limits.image_formats, max_megapixels=limits.max_megapixels)
    return ImageFile(hashlib.sha256(data).hexdigest(), data), header.size_hw


def decode_base64(text: str) -> bytes:
    """Standard base64, also behind `data:...;base64,`; else a ServeError `malformed_body`."""
    head, comma, _ = text[:200].partition(",")
    if comma and head.startswith("data:"):
        if not head.endswith(";base64"):
            raise ServeError("malformed_body", "image_base64 is a data address without ;base64", field="image_base64")
        text = text[len(head) + 1 :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        message = "image_base64 is no standard base64 (A-Z a-z 0-9 + / =)"
        raise ServeError("malformed_body", message, field="image_base64") from None


def to_call(request: SegmentRequest, image: ImageFile, timeout_s: float) -> SegmentCall:
    return SegmentCall(
        image=image,
        prompts=tuple(request.prompts),
        boxes=_boxes(request),
        adapter=request.adapter,
        post_processing=request.post_processing(),
        masks=request.masks != "none",
        keep_masks=request.keep_masks,
        timeout_s=timeout_s,
    )


def _boxes(request: SegmentRequest) -> tuple[BoxPrompt, ...]:
    return tuple(BoxPrompt((box.xyxy[0], box.xyxy[1], box.xyxy[2], box.xyxy[3]), box.label) for box in request.boxes)
