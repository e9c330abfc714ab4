"""Requests for the masks of clicked objects: their checks, the call that a replica gets, and the response."""

from __future__ import annotations

from collections.abc import Sequence

from sam3lora.data.rle import read_rle
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_box_xyxy
from serve_app.http.body import Received
from serve_app.http.errors import ServeError
from serve_app.http.formats import mask_as
from serve_app.http.refine_schemas import MaskRequest, MaskResponse, ObjectResponse, RefineRequest, RefineResponse
from serve_app.http.requests import find_image
from serve_app.http.schemas import ImageSize, MaskFormat, check
from serve_app.http.writing import Writing
from serve_app.messages import ImageFile, RefineCall, RefinedMask, RefinedObject, RefineReply
from serve_app.settings import Limits

MAX_CODE_CHARS = 1 << 20  # of a mask: reading takes 70 times its memory. A net of cracks at 4000 x 3000 has 600,000
_MULTIMASK = {"auto": None, "always": True, "never": False}


def check_refine(received: Received, limits: Limits) -> tuple[RefineRequest, tuple[RefinedObject, ...], ImageFile]:
    """The request, its objects and its image. Reads and hashes files, which takes milliseconds: use a thread.

    Places in an uploaded image are checked by the replica, which knows its size.

    Raises:
        ServeError: The first fault.
    """
    request: RefineRequest = check(RefineRequest, received.fields)
    if len(request.objects) > limits.max_objects:
        message = f"expected at most {limits.max_objects} objects, got {len(request.objects)}: ask in parts"
        raise ServeError("invalid_request", message, field="objects")
    objects = []
    for number, asked in enumerate(request.objects):
        name = f"objects[{number}]"
        if len(asked.clicks) > limits.max_clicks:
            message = f"{name}.clicks: expected at most {limits.max_clicks} clicks, got {len(asked.clicks)}"
            raise ServeError("invalid_click", message, field=f"{name}.clicks")
        if not asked.clicks and asked.box is None:
            message = f"{name} has neither a click nor a box: give one that shows the object"
            raise ServeError("invalid_request", message, field=name)
        if asked.box is None and asked.mask is None and not any(click.label for click in asked.clicks):
            message = f"{name}.clicks all say what does not belong to the object: add one with label 1, a box or a mask"
            raise ServeError("invalid_click", message, field=f"{name}.clicks")
        clicks = tuple(Click(click.x, click.y, click.label) for click in asked.clicks)
        box = None if asked.box is None else (asked.box[0], asked.box[1], asked.box[2], asked.box[3])
        objects.append(RefinedObject(clicks, box, _mask(asked.mask, f"{name}.mask")))
    image, size_hw = find_image(received.image, request.image_base64, request.image_id, limits)
    if size_hw is not None:
        check_places(objects, size_hw)
    return request, tuple(objects), image


def check_places(objects: Sequence[RefinedObject], size_hw: tuple[int, int]) -> None:
    """Raise a ServeError for a click or a box that is not inside the image, or a mask of another size."""
    height, width = size_hw
    image = f"the image of {width} x {height} pixels"
    for number, one in enumerate(objects):
        name = f"objects[{number}]"
        for place, click in enumerate(one.clicks):
            if not (0 <= click.x < width and 0 <= click.y < height):
                field = f"{name}.clicks[{place}]"
                message = f"{field} lies outside of {image}: expected 0 <= x < {width} and 0 <= y < {height}"
                raise ServeError("invalid_click", message, field=field)
        if one.box_xyxy is not None:
            x0, y0, x1, y1 = one.box_xyxy
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                message = f"{name}.box has no area or does not lie inside {image}: expected x0, y0, x1, y1 in pixels"
                raise ServeError("invalid_box", message, field=f"{name}.box")
        if isinstance(one.mask, dict) and tuple(one.mask["size"]) != size_hw:
            message = f"{name}.mask has another size than {image}: expected size [{height}, {width}]"
            raise ServeError("invalid_mask", message, field=f"{name}.mask.size")


def _mask(asked: MaskRequest | None, name: str) -> str | Rle | None:
    """The id of a kept mask, or a run-length code that is safe to decode."""
    if asked is None:
        return None
    code = (asked.size, asked.counts)
    if asked.mask_id is not None and code == (None, None):
        return asked.mask_id
    if asked.mask_id is not None or None in code:
        message = f'{name}: expected {{"mask_id": ...}}, or {{"size": [height, width], "counts": ...}}'
        raise ServeError("invalid_mask", message, field=name)
    if asked.counts is not None and len(asked.counts) > MAX_CODE_CHARS:
        message = (
            f"{name}.counts has {len(asked.counts)} characters, expected at most {MAX_CODE_CHARS}: name a kept mask by "
            "its mask_id, or leave the mask out"
        )
        raise ServeError("invalid_mask", message, field=f"{name}.counts")
    try:
        return read_rle({"size": asked.size, "counts": asked.counts})
    except ValueError:
        message = f"{name} is no compressed COCO run-length code whose runs add up to its size"
        raise ServeError("invalid_mask", message, field=f"{name}.counts") from None


def to_refine_call(
    request: RefineRequest, objects: tuple[RefinedObject, ...], image: ImageFile, timeout_s: float
) -> RefineCall:
    return RefineCall(
        image,
        objects,
        request.adapter,
        _MULTIMASK[request.multimask],
        request.clicks_vision,
        request.click_adapter,
        MaskCleaning(request.max_hole_area, request.max_sprinkle_area),
        timeout_s,
    )


def refine_response(reply: RefineReply, request: RefineRequest, writing: Writing) -> RefineResponse:
    """The response body; whether it is over is asked before every object.

    Raises:
        TimeoutError: It is over: nobody waits for the response any more.
    """
    objects = []
    for one in reply.objects:
        if writing.is_over():
            raise TimeoutError
        first, *others = (_fields(mask, request.masks) for mask in one.masks)
        alternatives = [MaskResponse.model_construct(**fields) for fields in others]
        score = round(one.object_score, 6)
        objects.append(ObjectResponse.model_construct(**first, object_score=score, alternatives=alternatives))
    height, width = reply.size_hw
    return RefineResponse.model_construct(
        request_id=writing.request_id,
        image=ImageSize(width=width, height=height),
        adapter=request.adapter,
        click_adapter=request.click_adapter,
        objects=objects,
        timing_ms=writing.clock.with_total(reply.timing_ms),
    )


def _fields(mask: RefinedMask, masks: MaskFormat) -> dict:
    """Of a `MaskResponse`."""
    fields = {
        "score": round(mask.score, 6),
        "box_xyxy": list(rle_box_xyxy(mask.rle)),
        "area_px": rle_area_px(mask.rle),
        "mask_id": mask.mask_id,
    }
    return fields if masks == "none" else fields | {"mask": mask_as(masks, mask.rle)}
