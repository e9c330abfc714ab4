"""Request and response bodies of `POST /v1/refine`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, FailFast, Field, StringConstraints

from sam3lora.engine.clicks.click import ClicksVision
from sam3lora.engine.clicks.mask_cleaning import MAX_AREA
from serve_app.http.schemas import IMAGE_ID_PATTERN, MASK_ID_PATTERN, ImageSize, MaskFormat, RequestModel, RleMask
from serve_app.settings import ADAPTER_ID_PATTERN


class ClickRequest(RequestModel):
    """A point in pixels of the image as people see it (EXIF orientation applied); (0, 0) is at the top left."""

    x: float
    y: float
    label: Annotated[int, Field(ge=0, le=1)] = Field(1, description="1: belongs to the object; 0: does not.")


class MaskRequest(RequestModel):
    """The mask to start from: a kept one, or a run-length code at the size of the image."""

    mask_id: Annotated[str, StringConstraints(pattern=MASK_ID_PATTERN)] | None = Field(
        None, description="Of an answer about the same image."
    )
    size: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Height and width, of a run-length code."
    )
    counts: str | None = Field(None, description="Of a compressed COCO run-length code.")


class ObjectRequest(RequestModel):
    """What shows an object: a click or a box at least."""

    clicks: Annotated[list[ClickRequest], FailFast()] = Field(
        default_factory=list, description="All of them, those of earlier requests too."
    )
    box: Annotated[list[float], Field(min_length=4, max_length=4)] | None = Field(
        None, description="Left, top, right, bottom in pixels: the object is in it."
    )
    mask: MaskRequest | None = Field(
        None, description="What to correct: the answer to the clicks before the last one, or what a prompt found."
    )


class RefineRequest(RequestModel):
    """Which objects are meant, and how to answer."""

    objects: Annotated[list[ObjectRequest], FailFast()] = Field(
        description="Each is answered on its own.",
        min_length=1,
        examples=[[{"clicks": [{"x": 120, "y": 80, "label": 1}]}]],
    )
    adapter: Annotated[str, StringConstraints(pattern=ADAPTER_ID_PATTERN)] | None = Field(
        None,
        description="Id of an adapter of GET /v1/adapters: the click head sees its vision trunk. Null is the base.",
    )
    click_adapter: Annotated[str, StringConstraints(pattern=ADAPTER_ID_PATTERN)] | None = Field(
        None,
        description="Id of an adapter whose task is clicks: its click head answers. Null is the base's. It has to be "
        "trained on the vision trunk that clicks see.",
    )
    clicks_vision: ClicksVision = Field(
        "adapter", description='"base" shows the click head the trunk without the adapter, which it was trained on.'
    )
    multimask: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether to answer three masks of an object, which differ in what they take it for: by default for "
        "a single click alone, which may mean a part or the whole.",
    )
    masks: MaskFormat = Field(
        "rle",
        description="Compressed COCO run-length code, outlines, base64 of a PNG with one bit a pixel, or no masks.",
    )
    max_hole_area: Annotated[int, Field(ge=0, le=MAX_AREA)] = Field(
        0,
        description="Holes up to this area are filled, except those with a click of label 0; 0 fills none. In pixels "
        "of the low-resolution mask, each 3.5 x 3.5 pixels of the model's input. The kept mask stays as it is.",
    )
    max_sprinkle_area: Annotated[int, Field(ge=0, le=MAX_AREA)] = Field(
        0,
        description="Parts up to this area are left out, in the same pixels, except the largest and those with a click "
        "of label 1; 0 leaves out none.",
    )
    image_base64: str | None = Field(
        None, description='The image file in base64, in JSON bodies; "data:image/png;base64," may stand before it.'
    )
    image_id: Annotated[str, StringConstraints(pattern=IMAGE_ID_PATTERN)] | None = Field(
        None, description="An image of POST /v1/images."
    )


class MaskResponse(BaseModel):
    """A mask of an object."""

    score: float = Field(description="The IoU with the object that the model expects, in [0, 1].")
    box_xyxy: list[float] = Field(description="Tight box in pixels; four zeros if the mask has none.")
    area_px: int = Field(description="Pixels of the mask; 0 if the model sees no object.")
    mask: RleMask | list[list[float]] | str | None = Field(
        None,
        description="COCO RLE, or outer outlines [[x0, y0, x1, y1, ...], ...], or base64 of a PNG; absent with "
        '"none". All are at the size of the image.',
    )
    mask_id: str | None = Field(
        description="To start the next request from; it goes with the image. Null if there was no room for it."
    )


class ObjectResponse(MaskResponse):
    """The mask of the highest score, and the others."""

    object_score: float = Field(description="Probability in [0, 1] that there is an object.")
    alternatives: list[MaskResponse] = Field(description="By descending score; empty if one mask was asked for.")


class RefineResponse(BaseModel):
    request_id: str
    image: ImageSize
    adapter: str | None
    click_adapter: str | None
    objects: list[ObjectResponse] = Field(description="In the order of the request.")
    timing_ms: dict[str, float] = Field(description='Milliseconds by stage, and "total".')
