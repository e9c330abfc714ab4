"""Messages between the HTTP ingress and the model replicas: plain values, checked before they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        if self.image.data is None or self.adapter is None:
            return self.image.key
        return f"adapter {self.adapter}"


@dataclass(frozen=True)
class AdapterQuery:
    """Which adapters to list.

    Attributes:
        search: In the id or a prompt, whatever the case; None is all.
        limit: Most adapters of the answer; None is no limit.
        after: Only ids behind this one.
    """

    search: str | None = None
    limit: int | None = None
    after: str | None = None


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


@dataclass(frozen=True)
class ImageReply:
    """The replica keeps the uploaded image under `key`; `cached`: it had the image already."""

    key: str
    size_hw: tuple[int, int]
    cached: bool
