"""Pictures of a split for reports: the labels and the detections of each model, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np

from sam3lora.data.images import ImageError, read_annotated_image
from sam3lora.evaluation.metrics.cgf1_units import count_units
from sam3lora.evaluation.metrics.measure import SplitMetrics
from sam3lora.evaluation.metrics.ranking import MatchCounts, PairCounts
from sam3lora.inference.drawing import (
    ADAPTER_RGB,
    BASE_RGB,
    GROUND_TRUTH_RGB,
    Marked,
    Rgb,
    draw_instances,
    encode_image,
    mark_coco,
)

Kind = Literal["labels", "base", "adapter", "plain"]

COLOURS_RGB: dict[Kind, Rgb] = {"labels": GROUND_TRUTH_RGB, "base": BASE_RGB, "adapter": ADAPTER_RGB}
MAX_NAMED = 12  # with more objects in a panel, the names would hide the picture and are left out

PICTURE_BYTES = 5_000_000  # of all JPEGs of a report; base64 adds a third
_SIDES_PX = (320, 720)
_MAX_ENLARGEMENT = 4.0
_VISIBLE = 0.3  # part of a pixel that a mask must cover to be drawn there; low, so that thin cracks stay


@dataclass(frozen=True)
class Panel:
    """An image with the labels or one model's detections."""

    kind: Kind
    caption: str
    size_hw: tuple[int, int]
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True)
class Picture:
    """Panels of one image side by side; none where the image can no longer be read, and `reason` says why."""

    title: str
    panels: list[Panel]
    reason: str = ""

    @classmethod
    def of(cls, title: str, draw: Callable[[], list[Panel]]) -> Picture:
        """What is drawn from an image: one that is gone or damaged ends no report."""
        try:
            return cls(title, draw())
        except ImageError as error:
            return cls(title, [], str(error))


@dataclass
class Gallery:
    """Draws images of one split with the detections of one model or several, at the thresholds of each.

    The number of panels in the report decides their size.
    """

    results: Sequence[SplitMetrics]
    num_panels: int

    def __post_init__(self) -> None:
        self._truth = self.results[0].truth
        self.names = {category.id: category.name for category in self._truth.categories}
        self._ids = list(self.names)

    @cached_property
    def counts(self) -> list[PairCounts]:
        """For each model: right, wrong and missed, of every category in every image."""
        return [
            PairCounts.of(count_units(result.matches.units, np.array(list(result.thresholds.values()))))
            for result in self.results
        ]

    @cached_property
    def totals(self) -> list[list[MatchCounts]]:
        """For each model: right, wrong and missed in each image."""
        return [counts.images() for counts in self.counts]

    def file_name(self, image: int) -> str:
        """The name of an image, by its position."""
        return self._truth.index.table.column("file_name")[image].as_py()

    def picture(self, image: int, category: int | None = None) -> Picture:
        """An image with the labels and each model's detections, of one category or of all; both by their positions."""

        def draw() -> list[Panel]:
            pixels = self._pixels(image)
            return [self._panel(pixels, image, category, model) for model in (None, *range(len(self.results)))]

        return Picture.of(self.file_name(image), draw)

    def detections(self, image: int, category: int, model: int, title: str) -> Picture:
        """The detections of one model, by its position, for a category, without the labels."""
        return Picture.of(title, lambda: [self._panel(self._pixels(image), image, category, model)])

    def _pixels(self, image: int) -> np.ndarray:
        return read_annotated_image(self._truth.index.record(image))

    def _panel(self, pixels_HW3: np.ndarray, image: int, category: int | None, model: int | None) -> Panel:
        entries = self._entries(image, model)
        if category is not None:
            entries = [entry for entry in entries if entry["category_id"] == self._ids[category]]
        if model is None:
            kind: Kind = "labels"
            caption = f"labels: {len(entries) or 'none'}"
        else:
            label = self.results[model].label
            kind = "base" if label == "base" else "adapter"
            counts = self.totals[model][image] if category is None else self.counts[model].pair(image, category)
            caption = f"{label}: {describe(counts)}"
        names = self.names if category is None else dict.fromkeys(self.names, "")
        drawn = draw_panel(pixels_HW3, entries, names, COLOURS_RGB[kind], panel_side_px(self.num_panels))
        height, width = drawn.shape[:2]
        return Panel(kind, caption, (height, width), encode_within(drawn, PICTURE_BYTES // max(1, self.num_panels)))

    def _entries(self, image: int, model: int | None) -> list[dict[str, Any]]:
        """The labels of an image, or a model's detections at its thresholds."""
        image_id = self._truth.image_ids[image]
        if model is None:
            return self._truth.annotations_of(image_id)
        result = self.results[model]
        found = [] if result.predictions is None else result.predictions.of_image(image_id)
        return [entry for entry in found if entry["score"] >= result.thresholds[entry["category_id"]]]


def threshold_texts(results: Sequence[SplitMetrics]) -> str:
    """The models' thresholds in words: one text if they are the same, else one for each label."""
    texts = {result.label: result.threshold_text for result in results}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({label})" for label, text in texts.items())


def describe(counts: MatchCounts) -> str:
    """ "3 right, 1 missed"."""
    parts = {"right": counts.num_right, "wrong": counts.num_wrong, "missed": counts.num_missed}
    return ", ".join(f"{num} {name}" for name, num in parts.items() if num) or "nothing, rightly"


def panel_side_px(num_panels: int) -> int:
    """Longer side of a panel with which `num_panels` fit into about `PICTURE_BYTES` at good quality."""
    bytes_per_square_side = 0.2  # photographs at quality 80, sides 4:3
    low, high = _SIDES_PX
    return int(np.clip((PICTURE_BYTES / bytes_per_square_side / max(1, num_panels)) ** 0.5, low, high))


def draw_panel(
    pixels_HW3: np.ndarray,
    entries: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    colour_rgb: Rgb,
    side_px: int,
) -> np.ndarray:
    """Draw COCO annotations or results on an image whose longer side becomes `side_px`, at most four times its size."""
    height, width = pixels_HW3.shape[:2]
    resized = fit_side(pixels_HW3, side_px)
    size_wh = (resized.shape[1], resized.shape[0])
    marked = [_resized(entry, size_wh) for entry in mark_coco(entries, names, (height, width))]
    return draw_instances(resized, marked, colours_rgb=colour_rgb, show_labels=len(marked) <= MAX_NAMED, min_side=1)


def fit_side(pixels_HW3: np.ndarray, side_px: int) -> np.ndarray:
    """The image resized so that its longer side has `side_px`, at most to four times its size."""
    height, width = pixels_HW3.shape[:2]
    factor = min(_MAX_ENLARGEMENT, side_px / max(height, width))
    size_wh = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(pixels_HW3, size_wh, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def encode_within(pixels_HW3: np.ndarray, max_bytes: int) -> bytes:
    """JPEG of at most `max_bytes` at the best quality that fits; an image of noise, which never fits, is reduced."""
    for quality in (85, 75, 60, 40, 20):
        jpeg = encode_image(pixels_HW3, quality=quality)
        if len(jpeg) <= max_bytes:
            return jpeg
    height, width = pixels_HW3.shape[:2]
    if min(height, width) < 16:
        return jpeg
    return encode_within(cv2.resize(pixels_HW3, (width // 2, height // 2), interpolation=cv2.INTER_AREA), max_bytes)


def _resized(marked: Marked, size_wh: tuple[int, int]) -> Marked:
    """The instance with its mask at another size and without a box; an empty mask draws nothing."""
    label, mask_HW = marked.label.strip(), marked.mask_HW
    if mask_HW is None:
        return Marked(label)
    mask_HW = mask_HW.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask_HW)
    full_height, full_width = mask_HW.shape
    left, right = x * size_wh[0] // full_width, math.ceil((x + width) * size_wh[0] / full_width)
    top, bottom = y * size_wh[1] // full_height, math.ceil((y + height) * size_wh[1] / full_height)
    resized_HW = np.zeros(size_wh[::-1], bool)
    if width:
        window = mask_HW[y : y + height, x : x + width] * 255
        coverage = cv2.resize(window, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        # An object smaller than a pixel stays visible: its pixel of greatest coverage is drawn.
        resized_HW[top:bottom, left:right] = coverage >= min(_VISIBLE * 255, coverage.max())
    return Marked(label, resized_HW)
