"""What the HTTP ingress and a segmenter replica say to each other: plain values, checked before they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sam3lora.engine.detections import BoxPrompt, Instances, PostProcessing
from serve_app.http.errors import ServeError


@dataclass(frozen=True)
class ImageFile:
    """An image as it came.

    Attributes:
        key: SHA-256 of the bytes, in hex: equal keys are equal images.
        data: The file, not decoded; None refers to an image that was uploaded before.
    """

    key: str
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class SegmentCall:
    """One request. `timeout_s` is what is left of its time when it is sent."""

    image: ImageFile
    prompts: tuple[str, ...]
    boxes: tuple[BoxPrompt, ...] = ()
    adapter: str | None = None
    post: PostProcessing = field(default_factory=PostProcessing)
    masks: bool = True
    timeout_s: float = 30.0

    @property
    def affinity(self) -> str:
        """Calls of equal affinity go to the same replica while it has room."""
        if self.image.data is None or self.adapter is None:
            return self.image.key
        return f"adapter {self.adapter}"


@dataclass(frozen=True)
class SegmentReply:
    """`results` are in the order of the prompts; times are in milliseconds by stage."""

    size_hw: tuple[int, int]
    results: Sequence[Instances]
    timing_ms: dict[str, float]


@dataclass(frozen=True)
class ImageReply:
    """An uploaded image is kept under `key`; `cached` says that it was there already."""

    key: str
    size_hw: tuple[int, int]
    cached: bool


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter without loading it."""

    id: str
    prompts: tuple[str, ...] = ()
    rank: int | None = None
    size_bytes: int | None = None
    adapts: tuple[str, ...] = ()
    resident: bool = False
    error: str | None = None


Failure = ServeError
"""Replicas return failures instead of raising them: Ray would log what is raised, with the arguments of the call."""
