"""Messages between the HTTP ingress and the model replicas: plain values, checked before they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sam3lora.engine.clicks.click import BoxXyxy, Click, ClicksVision
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MaskCleaning
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.mask_codes import Rle


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
        keep_masks: Whether the masks shall be kept for calls that refine them.
        timeout_s: What is left of the request's time when the call is sent.
    """

    image: ImageFile
    prompts: tuple[str, ...] = field(repr=False)
    boxes: tuple[BoxPrompt, ...] = ()
    adapter: str | None = None
    post_processing: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = True
    keep_masks: bool = False
    timeout_s: float = 30.0

    @property
    def affinity(self) -> str:
        """Calls of equal affinity go to the same replica while it has room; kept masks are where the image is."""
        return self.image.key if self.keep_masks else _affinity(self.image, self.adapter)


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


@dataclass(frozen=True)
class RefinedObject:
    """What one object is shown by.

    Attributes:
        mask: The id of a kept mask, or a mask at the size of the image, to start from.
    """

    clicks: tuple[Click, ...] = ()
    box_xyxy: BoxXyxy | None = None
    mask: str | Rle | None = field(default=None, repr=False)


@dataclass(frozen=True)
class RefineCall:
    """One request for the masks of objects that clicks, boxes and masks show.

    Attributes:
        adapter: Clicks see its vision trunk; None is the base's.
        click_adapter: Its click head answers; None is the base's.
        multimask: Whether to answer three masks of each object; None does for a single click alone.
        cleaning: Of the masks that are answered; those that are kept stay as the head made them.
        timeout_s: What is left of the request's time when the call is sent.
    """

    image: ImageFile
    objects: tuple[RefinedObject, ...]
    adapter: str | None = None
    multimask: bool | None = None
    clicks_vision: ClicksVision = "adapter"
    click_adapter: str | None = None
    cleaning: MaskCleaning = AS_IT_IS
    timeout_s: float = 30.0

    @property
    def affinity(self) -> str:
        """Kept masks are where the image is."""
        return self.image.key


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
    """Listed adapters by id, the number of all that match, whether more of them follow, and whether the base answers
    clicks."""

    rows: list[AdapterRow]
    total: int
    has_more: bool
    clicks: bool = False


@dataclass(frozen=True)
class SegmentReply:
    """Detections of each prompt, in the order of the prompts, and the milliseconds that each stage took.

    Attributes:
        mask_ids: For each prompt, for each detection the id of its kept mask, or None; None if none shall be kept.
    """

    size_hw: tuple[int, int]
    results: Sequence[Detections]
    timing_ms: dict[str, float]
    mask_ids: Sequence[Sequence[str | None]] | None = None


class RefinedMask(NamedTuple):
    """A mask of an object.

    Attributes:
        score: The IoU with the object that the model expects, in [0, 1].
        rle: At the size of the image.
        mask_id: Of the kept mask; None if there was no room.
    """

    score: float
    rle: Rle
    mask_id: str | None


class RefinedMasks(NamedTuple):
    """The masks of one object: the chosen one, then the others by descending score."""

    masks: Sequence[RefinedMask]
    object_score: float


@dataclass(frozen=True)
class RefineReply:
    """The masks of each object, in the order of the call, and the milliseconds that each stage took."""

    size_hw: tuple[int, int]
    objects: Sequence[RefinedMasks]
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
