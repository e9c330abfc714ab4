"""Pictures of label maps: the image tinted with the colours of its classes, and a legend below it."""

from __future__ import annotations

import cv2
import numpy as np

from sam3lora.data.label_palette import palette_rgb
from sam3lora.inference.dense.result import DenseResult
from sam3lora.inference.drawing import FONT, Rgb, enlarge, text_size, tint

_FILL = 0.55
_BLACK: Rgb = (0, 0, 0)
_MOST_ENTRIES = 24  # of a legend


def draw_labels(result: DenseResult) -> np.ndarray:
    """The image of a result with its foreground classes in the colours of the label map.

    The legend names the classes that the image has, with their share of it. Where classes overlap, the smaller one is
    on top.

    Returns:
        uint8 (k H + legend, k W, 3), RGB; small images are enlarged by a whole factor k.
    """
    assert result.image_HW3 is not None, "the result has no image to draw on"
    canvas, factor = enlarge(result.image_HW3)
    colours = palette_rgb()
    share, entries = result.area_share, []
    for name in sorted(result.settings.foreground, key=lambda one: -share[one]):
        if not result.area_px[name]:
            continue
        colour = _colour(colours, result.settings.value(name))
        mask = result.mask(name).astype(np.uint8)
        if factor > 1:
            mask = mask.repeat(factor, axis=0).repeat(factor, axis=1)
        tint(canvas, mask, colour, _FILL)
        entries.append((f"{name} {100 * share[name]:.1f} %", colour))
    if len(entries) > _MOST_ENTRIES:
        entries = [*entries[:_MOST_ENTRIES], (f"and {len(entries) - _MOST_ENTRIES} more", (255, 255, 255))]
    return np.concatenate([canvas, _legend(entries or [("background only", (255, 255, 255))], canvas.shape[1])])


def _colour(colours: np.ndarray, value: int) -> Rgb:
    red, green, blue = colours[value].tolist()
    return red, green, blue


def _legend(entries: list[tuple[str, Rgb]], width: int) -> np.ndarray:
    """A white strip with a swatch and a text for each entry, in as many rows as they need."""
    scale = max(0.5, width / 1600)
    stroke = max(1, round(scale * 1.6))
    _, text_h, descent = text_size("", scale, stroke)
    pad = max(4, round(8 * scale))
    row_h = text_h + descent + 2 * pad
    places, x, y = [], pad, 0
    for text, _ in entries:
        entry_w = text_h + text_size(text, scale, stroke)[0] + 3 * pad
        if x > pad and x + entry_w > width:
            x, y = pad, y + row_h
        places.append((x, y))
        x += entry_w
    strip = np.full((y + row_h, width, 3), 255, dtype=np.uint8)
    for (text, colour), (left, top) in zip(entries, places, strict=True):
        corner = (left + text_h, top + pad + text_h)
        cv2.rectangle(strip, (left, top + pad), corner, colour, -1)
        baseline = (left + text_h + pad, top + pad + text_h)
        cv2.putText(strip, text, baseline, FONT, scale, _BLACK, stroke, cv2.LINE_AA)
    return strip
