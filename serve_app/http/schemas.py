"""What clients send and get as JSON: the models that requests are checked with and the API's description shows."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from serve_app.http.errors import ServeError
from serve_app.settings import ADAPTER_ID_PATTERN

IMAGE_ID_PATTERN = r"^img_[0-9a-f]{64}$"
MaskFormat = Literal["rle", "polygon", "png", "none"]
Fraction = Annotated[float, Field(ge=0, le=1)]

_TYPE_OF_FIELD = {"prompts": "invalid_prompt", "boxes": "invalid_box", "adapter": "invalid_adapter"}
_ADDRESS_FIELDS = frozenset(("image_url", "image_uri", "url", "uri", "image_path", "path"))
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, half surrogate pairs, line separators


class _Request(BaseModel):
    # Strict: "0.5" is no number and 1 is no bool.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Box(_Request):
    """A box that shows what is meant, or what is not."""

    xyxy: Annotated[list[float], Field(min_length=4, max_length=4)] = Field(
        description="Left, top, right, bottom in pixels of the image as people see it (EXIF orientation applied).",
        examples=[[40, 30, 200, 180]],
    )
    label: Annotated[int, Field(ge=0, le=1)] = Field(1, description="1: find such things; 0: not these.")


class SegmentRequest(_Request):
    """What to find, and how to answer. Prompts or a positive box are needed."""

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
    threshold: Fraction = Field(0.5, description="Lowest score of a detection.")
    nms_iou: Fraction = Field(0.5, description="Of two detections whose boxes overlap by more, the better one stays.")
    merge: bool = Field(False, description="Join overlapping masks: for cracks and other things without parts.")
    merge_iou: Fraction = Field(0.15, description="Mask IoU from which detections are joined; needs merge.")
    max_detections: Annotated[int, Field(ge=1)] = Field(100, description="Most detections of a prompt; the best stay.")
    masks: MaskFormat = Field(
        "rle",
        description="Compressed COCO run-length code, outlines, base64 of a PNG with one bit a pixel, or no masks.",
    )
    image_base64: str | None = Field(
        None, description='The image file in base64, in JSON bodies; "data:image/png;base64," may stand before it.'
    )
    image_id: Annotated[str, StringConstraints(pattern=IMAGE_ID_PATTERN)] | None = Field(
        None, description="An image of POST /v1/images."
    )


class ImageUpload(_Request):
    """An image as JSON."""

    image_base64: str = Field(description="The image file in base64.")


class Detection(BaseModel):
    """One thing that was found."""

    score: float = Field(description="In [0, 1].")
    box_xyxy: list[float] = Field(description="Left, top, right, bottom in pixels.")
    area_px: int | None = Field(None, description='Pixels of the mask; absent with masks "none".')
    mask: RleMask | list[list[float]] | str | None = Field(
        None,
        description="COCO RLE, or outer outlines [[x0, y0, x1, y1, ...], ...], or base64 of a PNG; absent with "
        '"none". All are at the size of the image.',
    )


class RleMask(BaseModel):
    """Compressed COCO run-length code."""

    size: list[int] = Field(description="Height and width.")
    counts: str


class PromptResult(BaseModel):
    """What was found for one prompt, best first."""

    prompt: str = Field(description='"visual" for boxes without prompts.')
    presence: float = Field(description="Probability that the image shows the prompt at all.")
    num_detections: int
    detections: list[Detection]


class ImageSize(BaseModel):
    width: int
    height: int


class SegmentResponse(BaseModel):
    request_id: str
    image: ImageSize
    adapter: str | None
    results: list[PromptResult] = Field(description="In the order of the prompts.")
    timing_ms: dict[str, float] = Field(description='Milliseconds by stage, and "total".')


class ImageResponse(BaseModel):
    request_id: str
    image_id: str = Field(description="Use it instead of the image; replicas forget images that are long unused.")
    width: int
    height: int
    timing_ms: dict[str, float]


class Adapter(BaseModel):
    id: str
    prompts: list[str] = Field(description="What it was trained on.")
    rank: int | None
    size_bytes: int | None
    adapts: list[str] = Field(description="Parts of the model that it changes.")
    resident: bool = Field(description="In some replica's memory, ready to answer.")
    error: str | None = Field(description="Why it cannot be used, if so.")


class AdapterList(BaseModel):
    adapters: list[Adapter]


class Status(BaseModel):
    status: str


class ErrorDetail(BaseModel):
    type: str = Field(description="For programs.")
    message: str = Field(description="For people: what was expected, what came, what to do.")
    request_id: str


class ErrorResponse(BaseModel):
    error: ErrorDetail


def check(model: type[BaseModel], fields: Mapping[str, Any], *, strict: bool = True) -> Any:
    """Fields to a model.

    Args:
        model: What they should be.
        fields: As they came.
        strict: False reads numbers and truth values from text.

    Raises:
        ServeError: The first thing wrong with them, by field.
    """
    unknown = [name for name in fields if name not in model.model_fields]
    if unknown:
        raise ServeError("invalid_request", _unknown_field(unknown[0], list(model.model_fields)))
    try:
        return model.model_validate(dict(fields), strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        raise ServeError(_type_of(first["loc"]), f"{path} is no field: leave it out") from None
    if first["type"] == "missing":
        raise ServeError(_type_of(first["loc"]), f"{path} is missing") from None
    reason = first["msg"].removeprefix("Input ")
    raise ServeError(_type_of(first["loc"]), f"{path} {reason[0].lower()}{reason[1:]}") from None


def check_prompts(prompts: Sequence[str], *, max_prompts: int, max_chars: int) -> None:
    """What can be told of prompts without the tokenizer.

    Raises:
        ServeError: `invalid_prompt`.
    """
    if len(prompts) > max_prompts:
        raise ServeError("invalid_prompt", f"expected at most {max_prompts} prompts, got {len(prompts)}: ask in parts")
    for number, prompt in enumerate(prompts):
        name = f"prompts[{number}]"
        if len(prompt) > max_chars:
            raise ServeError(
                "invalid_prompt",
                f"{name} has {len(prompt)} characters, expected at most {max_chars}: a short noun phrase works best",
            )
        if any(unicodedata.category(char) in _UNPRINTABLE for char in prompt):
            raise ServeError("invalid_prompt", f"{name} holds control characters or broken text: send plain words")
        if not any(char.isprintable() and not char.isspace() for char in prompt):
            raise ServeError("invalid_prompt", f"{name} is empty: name what to look for")


def check_boxes(boxes: Sequence[Box], *, max_boxes: int, size_hw: tuple[int, int] | None) -> None:
    """Boxes must have an area and lie inside the image (if its size is known).

    Raises:
        ServeError: `invalid_box`.
    """
    if len(boxes) > max_boxes:
        raise ServeError("invalid_box", f"expected at most {max_boxes} boxes, got {len(boxes)}")
    for number, box in enumerate(boxes):
        x0, y0, x1, y1 = box.xyxy
        if not (x0 < x1 and y0 < y1):
            raise ServeError("invalid_box", f"boxes[{number}] has no area: expected xyxy with x0 < x1 and y0 < y1")
        if x0 < 0 or y0 < 0:
            raise ServeError("invalid_box", f"boxes[{number}] begins outside the image: expected x0 and y0 from 0 on")
        if size_hw is not None and (x1 > size_hw[1] or y1 > size_hw[0]):
            raise ServeError(
                "invalid_box",
                f"boxes[{number}] ends outside the image of {size_hw[1]} x {size_hw[0]} pixels: expected x1 and y1 in "
                "pixels, within it",
            )


def _type_of(location: Sequence[str | int]) -> str:
    return _TYPE_OF_FIELD.get(str(location[0]) if location else "", "invalid_request")


def _path(location: Sequence[str | int]) -> str:
    """`boxes[0].xyxy[2]`; names that came from outside are shown if they are names."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _NAME.fullmatch(part) else "(a name)")
    return text or "the request"


def _unknown_field(name: str, known: list[str]) -> str:
    if name.lower() in _ADDRESS_FIELDS:
        return f"{name}: images are not fetched from addresses; send the image itself, or image_base64 in JSON"
    shown = name if _NAME.fullmatch(name) else "(a name)"
    nearest = difflib.get_close_matches(name[:60], known, n=1)
    return f"{shown} is no field: " + (f"is {nearest[0]} meant?" if nearest else f"expected {', '.join(known)}")
