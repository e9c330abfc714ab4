"""Request and response bodies of `POST /v1/dense`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from serve_app.http.schemas import IMAGE_ID_PATTERN, ImageSize, RequestModel, RleMask, Task
from serve_app.messages import LabelOutput
from serve_app.settings import ADAPTER_ID_PATTERN

MAX_CLASSES = 255  # of an adapter


class DenseRequest(RequestModel):
    """Which adapter shall label the pixels, and how to answer."""

    adapter: Annotated[str, StringConstraints(pattern=ADAPTER_ID_PATTERN)] = Field(
        description="Id of an adapter of GET /v1/adapters whose task is dense.", examples=["land-cover"]
    )
    output: LabelOutput | None = Field(
        None,
        description="A PNG of labels for the image; or for each class its mask as compressed COCO run-length code, or "
        "a PNG of its probability x 255; or areas alone. Default: labels, and run-length codes where classes may "
        "overlap, so that there are no labels.",
    )
    classes: list[str] | None = Field(
        None,
        description="Only these classes; other pixels are 0 in the PNG of labels. Default: all.",
        min_length=1,
        max_length=MAX_CLASSES,
        examples=[["water", "road"]],
    )
    threshold: float | None = Field(
        None,
        description="Lowest probability of a class that is found by itself. Default: the adapter's own. Refused where "
        "classes exclude each other: the most probable one counts.",
        gt=0,
        lt=1,
    )
    image_base64: str | None = Field(
        None, description='The image file in base64, in JSON bodies; "data:image/png;base64," may stand before it.'
    )
    image_id: Annotated[str, StringConstraints(pattern=IMAGE_ID_PATTERN)] | None = Field(
        None, description="An image of POST /v1/images."
    )


class ClassResponse(BaseModel):
    """A class in the image."""

    name: str
    area_px: int = Field(description="Its pixels.")
    share: float = Field(description="Its share of the image, in [0, 1].")
    value: int | None = Field(None, description='Of its pixels in `label_png`; with "label_png" only.')
    mask: RleMask | str | None = Field(
        None,
        description='COCO RLE with "rle", base64 of an 8-bit PNG with "probability_png", at the size of the image.',
    )


class DenseResponse(BaseModel):
    request_id: str
    image: ImageSize
    adapter: str
    task: Task
    classes: list[ClassResponse] = Field(description="In the order of the request, or of the adapter.")
    label_png: str | None = Field(
        None,
        description="Base64 of a PNG with a palette, at the size of the image: the value of each pixel is that of its "
        'class, 0 is the background; with "label_png" only.',
    )
    timing_ms: dict[str, float] = Field(description='Milliseconds by stage, and "total".')
