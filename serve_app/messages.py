"""Messages between the HTTP ingress and the model replicas: plain values, checked before they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sam3lora.engine.detections import BoxPrompt, Detections


@dataclass(frozen=True)
class ImageFile:
    """An image file as the client sent it.

    Attributes:
        key: SHA-256 of the bytes, in hex: equal keys are equal images.
        data: The file, not decoded; None refers to an image that was uploaded before.
    """

    key: str
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SegmentCall:
    """One segmentation request.

    Attributes:
        prompts: May be empty if there are boxes.
        boxes: Go with every prompt.
        adapter: None asks the base model.
        post_processing: Fields of `PostProcessing` that the request sets; the adapter's own values hold for the rest.
        timeout_s: What is left of the request's time when the call is sent.
    """

    image: ImageFile
    prompts: tuple[str, ...] = field(repr=False)
    boxes: tuple[BoxPrompt, ...] = ()
    adapter: str | None = None
    post_processing: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = True
    timeout_s: float = 30.0

    @property
    def affinity(self) -> str:
        """Calls of equal affinity go to the same replica while it has room."""
        return _affinity(self.image, self.adapter)


LabelOutput = Literal["label_png", "rle", "probability_png", "none"]
"""What the answer has of the pixels: their labels, or a mask or the probability of each class."""


@dataclass(frozen=True)
class DenseCall:
    """One request for the label of each pixel.

    Attributes:
        output: None for a label map where classes exclude each other, else a mask of each class.
        classes: Only these are answered; None is all.
        threshold: None takes the adapter's own.
        timeout_s: What is left of the request's time when the call is sent.
    """

    image: ImageFile
    adapter: str
    output: LabelOutput | None = None
    classes: tuple[str, ...] | None = field(default=None, repr=False)
    threshold: float | None = None
    timeout_s: float = 30.0

    @property
    def affinity(self) -> str:
        """As that of `SegmentCall`."""
        return _affinity(self.image, self.adapter)


def _affinity(image: ImageFile, adapter: str | None) -> str:
    return image.key if image.data is None or adapter is None else f"adapter {adapter}"


@dataclass(frozen=True)
class AdapterQuery:
    """Which adapters to list.

    Attributes:
        search: In the id, a prompt or a class, whatever the case; None is all.
        limit: Most adapters of the answer; None is no limit.
        after: Only ids behind this one.
        task: Only adapters of this task, and those of which it is not known; None is all.
    """

    search: str | None = None
    limit: int | None = None
    after: str | None = None
    task: str | None = None


EVERY_ADAPTER = AdapterQuery()


class AdapterRow(NamedTuple):
    """A listed adapter as the JSON of an `AdapterResponse`: 2,000 of them pass as cheaply as one text."""

    id: str
    resident: bool
    json: str


class AdapterPage(NamedTuple):
    """Listed adapters by id, the number of all that match, and whether more of them follow."""

    rows: list[AdapterRow]
    total: int
    has_more: bool


@dataclass(frozen=True)
class SegmentReply:
    """Detections of each prompt, in the order of the prompts, and the milliseconds that each stage took."""

    size_hw: tuple[int, int]
    results: Sequence[Detections]
    timing_ms: dict[str, float]


class LabelledClass(NamedTuple):
    """A class of a dense adapter in an image.

    Attributes:
        value: Of its pixels in the label map; None where there is no such map.
        share: Of the image, in [0, 1].
        mask: A compressed COCO RLE, or a PNG of the probability x 255.
    """

    name: str
    area_px: int
    share: float
    value: int | None = None
    mask: dict[str, Any] | bytes | None = None


@dataclass(frozen=True)
class DenseReply:
    """What the image has of each class, the label map as a PNG if it was asked for, and the milliseconds of stages."""

    size_hw: tuple[int, int]
    classes: Sequence[LabelledClass]
    label_png: bytes | None
    timing_ms: dict[str, float]


@dataclass(frozen=True)
class ImageReply:
    """The replica keeps the uploaded image under `key`; `cached`: it had the image already."""

    key: str
    size_hw: tuple[int, int]
    cached: bool
