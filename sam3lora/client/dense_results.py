"""Responses of the service about the labels of pixels, as arrays."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from sam3lora.client.segment_results import Rle, decode_rle


@dataclass(frozen=True, eq=False)
class ClassResult:
    """What an image has of one class.

    Attributes:
        area_px: Its pixels.
        share: Its share of the image, in [0, 1].
        value: Of its pixels in the label map; None without one.
    """

    name: str
    area_px: int
    share: float
    value: int | None
    _mask: Rle | str | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class DenseLabels:
    """The labels of an image; reads like the result of `Predictor.predict_dense`.

    Attributes:
        request_id: Id of the call in the service's log.
        size_hw: Height and width of the image in pixels.
        adapter: The adapter that answered.
        classes: In the order of the call, or of the adapter.
        timing_ms: Milliseconds in the service by stage, and "total".
    """

    request_id: str
    size_hw: tuple[int, int]
    adapter: str
    classes: Sequence[ClassResult]
    timing_ms: dict[str, float]
    _label_png: str | None = field(repr=False)

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> DenseLabels:
        return cls(
            answer["request_id"],
            (int(answer["image"]["height"]), int(answer["image"]["width"])),
            answer["adapter"],
            tuple(
                ClassResult(one["name"], int(one["area_px"]), float(one["share"]), one.get("value"), one.get("mask"))
                for one in answer["classes"]
            ),
            dict(answer["timing_ms"]),
            answer.get("label_png"),
        )

    @property
    def area_px(self) -> dict[str, int]:
        """Class -> its pixels."""
        return {one.name: one.area_px for one in self.classes}

    @property
    def area_share(self) -> dict[str, float]:
        """Class -> its share of the image, in [0, 1]."""
        return {one.name: one.share for one in self.classes}

    @cached_property
    def label_HW(self) -> np.ndarray | None:
        """uint8 (H, W): the value of each pixel's class, 0 is the background; None if no label map came."""
        return None if self._label_png is None else self._read_png(self._label_png)

    def mask(self, name: str) -> np.ndarray:
        """bool (H, W): the pixels of a class.

        Raises:
            KeyError: The answer has no such class.
            ValueError: It came with neither labels nor masks.
        """
        found = self._class(name)
        if self.label_HW is not None:
            return self.label_HW == found.value
        if not isinstance(found._mask, Mapping):
            raise ValueError("the answer has no masks: call with output='label_png' or 'rle'")
        return decode_rle(found._mask, self.size_hw)

    def probability(self, name: str) -> np.ndarray:
        """float32 (H, W) in [0, 1], in steps of 1/255: the probability of a class.

        Raises:
            KeyError: The answer has no such class.
            ValueError: It came in another form.
        """
        found = self._class(name)
        if not isinstance(found._mask, str):
            raise ValueError("the answer has no probabilities: call with output='probability_png'")
        return self._read_png(found._mask).astype(np.float32) / 255

    def _class(self, name: str) -> ClassResult:
        return {one.name: one for one in self.classes}[name]

    def _read_png(self, text: str) -> np.ndarray:
        """uint8 (H, W): values as they are stored, whatever the palette."""
        values_HW = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        if values_HW.shape != self.size_hw:
            raise ValueError(f"expected a map of {self.size_hw}, got {values_HW.shape}")
        return values_HW
