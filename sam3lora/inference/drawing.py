"""Pictures of instances: mask, outline and label over the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.masks import encode_segmentation

Rgb = tuple[int, int, int]

GROUND_TRUTH_RGB: Rgb = (22, 163, 74)
BASE_RGB: Rgb = (37, 99, 235)
ADAPTER_RGB: Rgb = (220, 38, 38)
PALETTE_RGB: tuple[Rgb, ...] = (
    (220, 38, 38),
    (37, 99, 235),
    (22, 163, 74),
    (217, 119, 6),
    (147, 51, 234),
    (8, 145, 178),
    (219, 39, 119),
    (101, 84, 60),
)

MIN_SIDE_PX = 440  # smaller images are enlarged, so that labels can be read,
MAX_SIDE_PX = 4096  # but not long strips beyond this
_FILL = 0.38
FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE: Rgb = (255, 255, 255)


@dataclass(frozen=True)
class Marked:
    """One object to draw, in pixels of the image: a mask, a box, or both, and what to write beside it.

    A mask is bool (H, W), or an RLE of that size, which takes no memory to speak of until it is drawn.
    """

    label: str
    mask: np.ndarray | Mapping[str, Any] | None = field(default=None, repr=False)
    box_xyxy: tuple[float, float, float, float] | None = None

    @property
    def mask_HW(self) -> np.ndarray | None:
        """The mask as uint8 0 or 1."""
        if self.mask is None:
            return None
        return coco_mask.decode(self.mask) if isinstance(self.mask, Mapping) else self.mask.astype(np.uint8)

    def window(self) -> tuple[int, int, np.ndarray] | None:
        """Left and upper end of the mask's tight box, and the mask in it as uint8 0 or 1; None without a pixel.

        Large images hold many small masks: what is drawn should not cost the whole image each time.
        """
        mask_HW = self.mask_HW
        if mask_HW is None:
            return None
        box = coco_mask.toBbox(self.mask) if isinstance(self.mask, Mapping) else cv2.boundingRect(mask_HW)
        x, y, width, height = (int(value) for value in box)
        return (x, y, np.ascontiguousarray(mask_HW[y : y + height, x : x + width])) if width and height else None


def mark_coco(entries: Iterable[Mapping[str, Any]], names: Mapping[Any, str], size_hw: tuple[int, int]) -> list[Marked]:
    """COCO annotations or results as objects to draw; results carry their score in the label ("gear 0.87")."""
    marked = []
    for entry in entries:
        name = names[entry["category_id"]]
        label = f"{name} {entry['score']:.2f}" if "score" in entry else name
        x, y, width, height = entry["bbox"]
        mask = encode_segmentation(entry.get("segmentation"), size_hw)
        marked.append(Marked(label, mask, (x, y, x + width, y + height)))
    return marked


def draw_instances(
    image_HW3: np.ndarray,
    instances: Sequence[Marked],
    *,
    colours_rgb: Rgb | Sequence[Rgb] = PALETTE_RGB,
    show_masks: bool = True,
    show_boxes: bool = False,
    show_labels: bool = True,
    min_side: int = MIN_SIDE_PX,
) -> np.ndarray:
    """Draw instances over a copy of an image (uint8 RGB), the first ones in front.

    Args:
        colours_rgb: One colour for all, or colours to take in turn.
        min_side: An image whose shorter side is below this is enlarged by a whole factor k.

    Returns:
        uint8 (k H, k W, 3), RGB; k is 1 for large images.
    """
    canvas, factor = enlarge(image_HW3, min_side)
    height, width = canvas.shape[:2]
    colours = _as_list(colours_rgb)
    stroke = max(2, round(min(height, width) / 300))
    order = list(enumerate(instances))[::-1]
    outlines = {}
    for number, instance in order:
        colour = colours[number % len(colours)]
        window = instance.window() if show_masks else None
        if window is not None:
            left, top, mask = _enlarge_window(*window, factor)
            place = (left, top)
            outlines[number] = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=place)[0]
            tint(canvas[top : top + len(mask), left : left + mask.shape[1]], mask, colour)
    for number, instance in order:
        colour = colours[number % len(colours)]
        cv2.drawContours(canvas, outlines.get(number, ()), -1, _WHITE, stroke + 2, cv2.LINE_AA)
        cv2.drawContours(canvas, outlines.get(number, ()), -1, colour, stroke, cv2.LINE_AA)
        if show_boxes and instance.box_xyxy is not None:
            x0, y0, x1, y1 = (round(value * factor) for value in instance.box_xyxy)
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), colour, stroke, cv2.LINE_AA)
    if show_labels:
        _draw_labels(canvas, instances, colours, factor)
    return canvas


def enlarge(image_HW3: np.ndarray, min_side: int = MIN_SIDE_PX) -> tuple[np.ndarray, int]:
    """A copy to draw on, and its whole factor, at most 4, that brings the shorter side to `min_side`.

    It brings no side beyond `MAX_SIDE_PX`.
    """
    shorter, longer = sorted(image_HW3.shape[:2])
    factor = max(1, min(4, -(-min_side // max(1, shorter)), MAX_SIDE_PX // max(1, longer)))
    height, width = (side * factor for side in image_HW3.shape[:2])
    if factor == 1:
        return image_HW3.copy(), factor
    return cv2.resize(image_HW3, (width, height), interpolation=cv2.INTER_CUBIC), factor


def encode_image(image_HW3: np.ndarray, extension: str = ".jpg", quality: int = 85) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == ".jpg" else []
    done, data = cv2.imencode(extension, cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR), options)
    assert done, f"OpenCV cannot write {extension}"
    return data.tobytes()


def _as_list(colours_rgb: Rgb | Sequence[Rgb]) -> list[Rgb]:
    if isinstance(colours_rgb[0], int):
        return [cast(Rgb, colours_rgb)]
    return list(cast(Sequence[Rgb], colours_rgb))


def _enlarge_window(x: int, y: int, mask: np.ndarray, factor: int) -> tuple[int, int, np.ndarray]:
    """The same window on a canvas enlarged by a whole factor, with smooth edges."""
    if factor == 1:
        return x, y, mask
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0).astype(np.float32)
    coverage = cv2.resize(padded, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    inner = coverage[factor:-factor, factor:-factor]
    return x * factor, y * factor, np.ascontiguousarray(inner >= 0.5, dtype=np.uint8)


def tint(window: np.ndarray, mask: np.ndarray, colour: Rgb, fill: float = _FILL) -> None:
    """Tint a view of the canvas under a mask of its size, uint8 0 or 1; `fill` is the share of the colour."""
    tinted = cv2.addWeighted(window, 1 - fill, np.full_like(window, colour), fill, 0)
    cv2.copyTo(tinted, mask, window)


def text_size(text: str, scale: float, stroke: int) -> tuple[int, int, int]:
    """Width, height and descent; the last two do not depend on the letters, so that tags are equally high."""
    (_, height), descent = cv2.getTextSize("Aghy", FONT, scale, stroke)
    return cv2.getTextSize(text, FONT, scale, stroke)[0][0], height, descent


def _draw_labels(canvas: np.ndarray, instances: Sequence[Marked], colours: list[Rgb], factor: int) -> None:
    """White text on a tag of the object's colour; a tag that would cover another moves down."""
    height, width = canvas.shape[:2]
    scale = max(0.5, min(height, width) / 900)
    stroke = max(1, round(scale * 1.6))
    placed: list[tuple[int, int, int, int]] = []
    for number, instance in enumerate(instances):
        anchor = _anchor(instance)
        if anchor is None or not instance.label:
            continue
        text_w, text_h, descent = text_size(instance.label, scale, stroke)
        pad = max(3, round(4 * scale))
        tag_w, tag_h = text_w + 2 * pad, text_h + descent + 2 * pad
        left = int(np.clip(anchor[0] * factor - tag_w / 2, 0, max(0, width - tag_w)))
        top = int(np.clip(anchor[1] * factor - tag_h - 2, 0, max(0, height - tag_h)))
        left, top = _free_place(left, top, tag_w, tag_h, height, placed)
        placed.append((left, top, left + tag_w, top + tag_h))
        colour = colours[number % len(colours)]
        cv2.rectangle(canvas, (left, top), (left + tag_w - 1, top + tag_h - 1), colour, -1)
        baseline = (left + pad, top + pad + text_h)
        cv2.putText(canvas, instance.label, baseline, FONT, scale, _WHITE, stroke, cv2.LINE_AA)


def _anchor(instance: Marked) -> tuple[float, float] | None:
    """The middle of the object's upper edge, (x, y)."""
    if isinstance(instance.mask, Mapping):
        x, y, width, _ = coco_mask.toBbox(instance.mask)
        if width:
            return float(x + width / 2), float(y)
    elif instance.mask is not None and instance.mask.any():
        x, y, width, _ = cv2.boundingRect(instance.mask.astype(np.uint8))
        return x + width / 2, y
    if instance.box_xyxy is not None:
        return (instance.box_xyxy[0] + instance.box_xyxy[2]) / 2, instance.box_xyxy[1]
    return None


def _free_place(
    left: int, top: int, tag_w: int, tag_h: int, height: int, placed: list[tuple[int, int, int, int]]
) -> tuple[int, int]:
    """The nearest row below (then above) the wanted place where the tag covers no other; the wanted place if none."""
    rows = [top + step * tag_h for step in (0, 1, -1, 2, -2, 3, -3)]
    for row in rows:
        if row < 0 or row + tag_h > height:
            continue
        if all(left >= x1 or left + tag_w <= x0 or row >= y1 or row + tag_h <= y0 for x0, y0, x1, y1 in placed):
            return left, row
    return left, top
