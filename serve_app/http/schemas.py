"""Request and response bodies of the HTTP API, and the checks of requests that need nothing else.

Requests are checked with these models, responses are made from them, and the API's description shows them.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.clicks.click import ClicksVision
from sam3lora.engine.detections import BoxPrompt
from serve_app.http.errors import ServeError
from serve_app.settings import ADAPTER_ID_PATTERN, ADAPTER_ID_RULE

IMAGE_ID_PATTERN = r"^img_[0-9a-f]{64}$"
MASK_ID_PATTERN = r"^msk_[0-9a-f]{32}$"
MaskFormat = Literal["rle", "polygon", "png", "none"]
Task = Literal["detection", "dense", "clicks"]

_TYPE_OF_FIELD = {
    "prompts": "invalid_prompt",
    "boxes": "invalid_box",
    "box": "invalid_box",
    "clicks": "invalid_click",
    "mask": "invalid_mask",
    "adapter": "invalid_adapter",
    "click_adapter": "invalid_adapter",
}
_ADDRESS_FIELDS = frozenset(("image_url", "image_uri", "url", "uri", "image_path", "path"))
_FORMS = {
    "adapter": ADAPTER_ID_RULE,
    "click_adapter": ADAPTER_ID_RULE,
    "image_id": "it is the one that POST /v1/images returned",
    "mask_id": "it is the one that POST /v1/refine or POST /v1/segment returned",
}
_UNSHOWN = "(a name)"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, half surrogate pairs, line separators


def _post_processing_field(name: str) -> Any:
    """An optional field with the description and the bounds that `PostProcessing` declares."""
    declared = PostProcessing.model_fields[name]
    bounds = {key: getattr(one, key) for one in declared.metadata for key in ("ge", "le") if hasattr(one, key)}
    return Field(None, description=f"{declared.description} Default: the adapter's own value.", **bounds)


# ---- requests -------------------------------------------------------------------------------------------------------


class RequestModel(BaseModel):
    # Strict: "0.5" is no number and 1 is no bool.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Box(RequestModel):
    """An example of what is meant, or of what is not."""

    xyxy: Annotated[list[float], Field(min_length=4, max_length=4)] = Field(
        description="Left, top, right, bottom in pixels of the image as people see it (EXIF orientation applied).",
        examples=[[40, 30, 200, 180]],
    )
    label: Annotated[int, Field(ge=0, le=1)] = Field(1, description="1: find such things; 0: not these.")


class SegmentRequest(RequestModel):
    """What to find, and how to answer. Prompts or a positive box are needed.

    Post-processing fields that are left out take the values recorded with the adapter.
    """

    prompts: Annotated[list[str], FailFast()] = Field(
        default_factory=list,
        description="Short noun phrases; each is answered on its own.",
        examples=[["crack", "pothole"]],
    )
    boxes: Annotated[list[Box], FailFast()] = Field(
        default_factory=list, description="Examples of what is meant, for all prompts."
    )
    adapter: Annotated[str, StringConstraints(pattern=ADAPTER_ID_PATTERN)] | None = Field(
        None, description="Id of an adapter of GET /v1/adapters; null asks the base model."
    )
    threshold: float | None = _post_processing_field("threshold")
    nms: Literal["mask", "box", "none"] | None = _post_processing_field("nms")
    nms_iou: float | None = _post_processing_field("nms_iou")
    merge: bool | None = _post_processing_field("merge")
    merge_iou: float | None = _post_processing_field("merge_iou")
    max_detections: int | None = _post_processing_field("max_detections")
    masks: MaskFormat = Field(
        "rle",
        description="Compressed COCO run-length code, outlines, base64 of a PNG with one bit a pixel, or no masks.",
    )
    keep_masks: bool = Field(
        False, description="Keep the masks beside the image, and answer a `mask_id` of each, for POST /v1/refine."
    )
    image_base64: str | None = Field(
        None, description='The image file in base64, in JSON bodies; "data:image/png;base64," may stand before it.'
    )
    image_id: Annotated[str, StringConstraints(pattern=IMAGE_ID_PATTERN)] | None = Field(
        None, description="An image of POST /v1/images."
    )

    def post_processing(self) -> dict[str, Any]:
        return self.model_dump(include=set(PostProcessing.model_fields), exclude_none=True)


class AdaptersRequest(RequestModel):
    """The query parameters of the listing."""

    search: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="Only adapters with this text in their id, a recorded prompt or a class, whatever the case."
    )
    limit: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Most adapters of the response; all of them if not given."
    )
    after: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="Only adapters behind this id: `next` of the page before."
    )
    task: Task | None = Field(
        None,
        description='Only those that find objects of prompts ("detection"), label pixels ("dense"), or answer clicks '
        '("clicks").',
    )


_NUMBERS_AND_BOOLS = (float | None, int | None, bool | None, bool)
NOT_TEXT = frozenset(name for name, one in SegmentRequest.model_fields.items() if one.annotation in _NUMBERS_AND_BOOLS)
"""Fields of numbers and bools, which are text in query parameters."""


class ImageUpload(RequestModel):
    """An image as JSON."""

    image_base64: str = Field(description="The image file in base64.")


# ---- responses ------------------------------------------------------------------------------------------------------


class RleMask(BaseModel):
    """Compressed COCO run-length code."""

    size: list[int] = Field(description="Height and width.")
    counts: str


class DetectionResponse(BaseModel):
    """One detection."""

    score: float = Field(description="In [0, 1].")
    box_xyxy: list[float] = Field(description="Left, top, right, bottom in pixels.")
    area_px: int | None = Field(None, description='Pixels of the mask; absent with masks "none".')
    mask: RleMask | list[list[float]] | str | None = Field(
        None,
        description="COCO RLE, or outer outlines [[x0, y0, x1, y1, ...], ...], or base64 of a PNG; absent with "
        '"none". All are at the size of the image.',
    )
    mask_id: str | None = Field(
        None, description="Of the mask, for POST /v1/refine; with keep_masks only, null if there was no room for it."
    )


class PromptResponse(BaseModel):
    """Detections of one prompt, best first."""

    prompt: str = Field(description='"visual" for boxes without prompts.')
    presence: float = Field(description="Probability that the image shows the prompt at all.")
    num_detections: int
    detections: list[DetectionResponse]


class ImageSize(BaseModel):
    width: int
    height: int


class SegmentResponse(BaseModel):
    request_id: str
    image: ImageSize
    adapter: str | None
    results: list[PromptResponse] = Field(description="In the order of the prompts.")
    timing_ms: dict[str, float] = Field(description='Milliseconds by stage, and "total".')


class ImageResponse(BaseModel):
    request_id: str
    image_id: str = Field(description="Use it instead of the image; replicas forget images that are long unused.")
    width: int
    height: int
    timing_ms: dict[str, float]


class AdapterResponse(BaseModel):
    """What the service knows of an adapter without loading it."""

    model_config = ConfigDict(frozen=True)

    id: str
    task: Task | None = Field(
        default=None,
        description='"detection": POST /v1/segment asks it; "dense": POST /v1/dense; "clicks": POST /v1/refine, as '
        "click_adapter; null if it cannot be read.",
    )
    prompts: list[str] = Field(default_factory=list, description="Prompts it was trained on.")
    classes: list[str] = Field(
        default_factory=list, description="Of task dense: the classes of a pixel, in the order of its outputs."
    )
    rank: int | None = Field(default=None, description="Largest rank of its LoRA matrices.")
    size_bytes: int | None = Field(default=None, description="Size of its weights.")
    adapts: list[str] = Field(default_factory=list, description="Parts of the model that it changes.")
    clicks_vision: ClicksVision | None = Field(
        default=None,
        description='Of task clicks: the vision trunk that it goes with. "base" is that of the base: ask with '
        'clicks_vision "base", or with no adapter that changes the trunk. "adapter" is that of an adapter: ask with '
        "one of vision_adapters as adapter.",
    )
    vision_adapters: list[str] = Field(
        default_factory=list,
        description='Of task clicks with clicks_vision "adapter": the adapters of this service that have that trunk. '
        "Without any it cannot be asked here.",
    )
    post_processing: PostProcessing | None = Field(
        default=None,
        description="Settings that hold where a request gives none; null for other tasks than detection, or if it "
        "cannot be read.",
    )
    resident: bool = Field(default=False, description="Some replica has it in memory.")
    error: str | None = Field(default=None, description="Why it cannot be used; null if it can.")


class AdaptersResponse(BaseModel):
    adapters: list[AdapterResponse] = Field(description="By id.")
    total: int = Field(description="Adapters that match the search, on all pages.")
    next: str | None = Field(description="The value of `after` for the next page; null if this is the last one.")
    base_post_processing: PostProcessing = Field(description="Settings of the base model where a request gives none.")
    clicks: bool = Field(description="Whether the base model has a click head, which POST /v1/refine needs.")
    request_id: str


class StatusResponse(BaseModel):
    status: str


class ErrorDetail(BaseModel):
    type: str = Field(description="For programs.")
    message: str = Field(description="For people: what was expected, what came, what to do.")
    request_id: str
    field: str | None = Field(description="The part of the request at fault, such as prompts[3], if it is one.")


class ErrorResponse(BaseModel):
    error: ErrorDetail


# ---- checks ---------------------------------------------------------------------------------------------------------


def check(model: type[BaseModel], fields: Mapping[str, Any]) -> Any:
    """Validate the fields of a request as the client sent them.

    Raises:
        ServeError: The first fault, with the name of its field.
    """
    unknown = [name for name in fields if name not in model.model_fields]
    if unknown:
        raise _unknown_field(unknown[0], list(model.model_fields))
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        reason = "is no field: leave it out"
    elif first["type"] == "missing":
        reason = "is missing"
    elif first["type"] == "string_pattern_mismatch":
        reason = f"has another form than expected: {_FORMS[str(first['loc'][-1])]}"
    else:
        text = first["msg"].removeprefix("Input ")
        reason = f"{text[0].lower()}{text[1:]}"
    raise ServeError(_type_of(first["loc"]), f"{path or 'the request'} {reason}", field=field_at(path)) from None


def check_prompts(prompts: Sequence[str], *, max_prompts: int, max_chars: int) -> None:
    """Raise a ServeError `invalid_prompt` for what can be seen without a tokenizer."""
    if len(prompts) > max_prompts:
        message = f"expected at most {max_prompts} prompts, got {len(prompts)}: ask in parts"
        raise ServeError("invalid_prompt", message, field="prompts")
    for number, prompt in enumerate(prompts):
        name = f"prompts[{number}]"
        if len(prompt) > max_chars:
            fault = f"has {len(prompt)} characters, expected at most {max_chars}: a short noun phrase works best"
        elif any(unicodedata.category(char) in _UNPRINTABLE for char in prompt):
            fault = "holds control characters or broken text: send plain words"
        elif not any(char.isprintable() and not char.isspace() for char in prompt):
            fault = "is empty: name what to look for"
        else:
            continue
        raise ServeError("invalid_prompt", f"{name} {fault}", field=name)


def check_boxes(boxes: Sequence[BoxPrompt], size_hw: tuple[int, int]) -> None:
    """Raise a ServeError `invalid_box` for a box without an area, or not inside the image."""
    height, width = size_hw
    for number, box in enumerate(boxes):
        x0, y0, x1, y1 = box.xyxy
        if not (x0 < x1 and y0 < y1):
            fault = "has no area: expected xyxy with x0 < x1 and y0 < y1"
        elif x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            fault = f"does not lie inside the image of {width} x {height} pixels: expected xyxy in pixels"
        else:
            continue
        raise ServeError("invalid_box", f"boxes[{number}] {fault}", field=f"boxes[{number}]")


def shown_name(name: str) -> str:
    """A name that the client made up, for messages; it is shown only if it has the form of a name."""
    return name if _NAME.fullmatch(name) else _UNSHOWN


def field_at(path: str) -> str | None:
    """The `field` of an error at this path; that of the parent if the name is not shown."""
    return path.removesuffix(_UNSHOWN).removesuffix(".") or None


def _type_of(location: Sequence[str | int]) -> str:
    """By the first part that has a type of its own."""
    return next((_TYPE_OF_FIELD[part] for part in location if part in _TYPE_OF_FIELD), "invalid_request")


def _path(location: Sequence[str | int]) -> str:
    """`boxes[0].xyxy[2]`; empty for the request as a whole."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + shown_name(part)
    return text


def _unknown_field(name: str, known: list[str]) -> ServeError:
    shown = shown_name(name)
    if name.lower() in _ADDRESS_FIELDS:
        message = f"{name}: images are not fetched from addresses; send the image itself, or image_base64 in JSON"
    else:
        nearest = difflib.get_close_matches(name[:60], known, n=1)
        meant = f"is {nearest[0]} meant?" if nearest else f"expected {', '.join(known)}"
        message = f"{shown} is no field: {meant}"
    return ServeError("invalid_request", message, field=field_at(shown))
