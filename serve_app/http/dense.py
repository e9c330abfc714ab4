"""Requests for the labels of pixels: their checks, the call that a replica gets, and the response."""

from __future__ import annotations

import base64

from serve_app.http.body import Received
from serve_app.http.dense_schemas import ClassResponse, DenseRequest, DenseResponse
from serve_app.http.errors import ServeError
from serve_app.http.requests import find_image
from serve_app.http.schemas import ImageSize, RleMask, check
from serve_app.http.writing import Writing
from serve_app.messages import DenseCall, DenseReply, ImageFile, LabelledClass
from serve_app.settings import Limits


def check_dense(received: Received, limits: Limits) -> tuple[DenseRequest, ImageFile]:
    """The request and its image. Hashes the file, which takes milliseconds: use a thread.

    Raises:
        ServeError: The first fault; those that depend on the adapter are found by the replica.
    """
    request: DenseRequest = check(DenseRequest, received.fields)
    for number, name in enumerate(request.classes or ()):
        if name in (request.classes or ())[:number]:
            field = f"classes[{number}]"
            raise ServeError("invalid_request", f"{field} is given twice", field=field)
    image, _ = find_image(received.image, request.image_base64, request.image_id, limits)
    return request, image


def to_dense_call(request: DenseRequest, image: ImageFile, timeout_s: float) -> DenseCall:
    classes = None if request.classes is None else tuple(request.classes)
    return DenseCall(image, request.adapter, request.output, classes, request.threshold, timeout_s)


def dense_response(reply: DenseReply, request: DenseRequest, writing: Writing) -> DenseResponse:
    """The response body; fields that were not asked for are not set."""
    height, width = reply.size_hw
    response = DenseResponse.model_construct(
        request_id=writing.request_id,
        image=ImageSize(width=width, height=height),
        adapter=request.adapter,
        task="dense",
        classes=[_class_response(one) for one in reply.classes],
        timing_ms=writing.clock.with_total(reply.timing_ms),
    )
    if reply.label_png is not None:
        response.label_png = _base64(reply.label_png)
    return response


def _class_response(found: LabelledClass) -> ClassResponse:
    response = ClassResponse.model_construct(name=found.name, area_px=found.area_px, share=found.share)
    if found.value is not None:
        response.value = found.value
    if isinstance(found.mask, bytes):
        response.mask = _base64(found.mask)
    elif found.mask is not None:
        response.mask = RleMask.model_construct(**found.mask)
    return response


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
