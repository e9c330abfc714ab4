"""Pictures of objects with the clicks on them, and the masks after some of the clicks.

Shapes: `H` `W` pixels of the image, or of the part of it that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from sam3lora.data.images import read_annotated_image
from sam3lora.data.masks import encode_mask_at
from sam3lora.data.rle import decode_window
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.mask_codes import Rle, rle_area_px, rle_box_xyxy
from sam3lora.evaluation.clicks.asking import SHOWN_CLICKS
from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.clicks.split_clicks import ObjectId
from sam3lora.evaluation.report.dense_pictures import resized_labels
from sam3lora.evaluation.report.html_page import score
from sam3lora.evaluation.report.pictures import PICTURE_BYTES, Panel, Picture, encode_within, fit_side, panel_side_px
from sam3lora.inference.drawing import Marked, Rgb, draw_instances

TRUTH_RGB: Rgb = (230, 159, 0)
MASK_RGB: Rgb = (0, 114, 178)
IN_RGB: Rgb = (22, 163, 74)
OUT_RGB: Rgb = (220, 38, 38)
LEGEND: dict[str, Rgb] = {
    "labelled outline": TRUTH_RGB,
    "mask": MASK_RGB,
    "click + (belongs to the object)": IN_RGB,
    "click × (does not)": OUT_RGB,
}
_WHITE: Rgb = (255, 255, 255)
_MARGIN = 0.25  # of the longer side of what is shown
_LEAST_MARGIN_PX = 8


class ClickGallery:
    """Draws objects of a split after 1, 3 and 8 clicks; the number of pictures decides their size."""

    def __init__(self, metrics: ClickMetrics, num_pictures: int) -> None:
        self._metrics = metrics
        self._rows = {image_id: row for row, image_id in enumerate(metrics.index.table.column("image_id").to_pylist())}
        self._runs = dict(zip(metrics.clicks.alone.objects, metrics.clicks.alone.runs, strict=True))
        self._num_panels = max(1, num_pictures * len(SHOWN_CLICKS))

    def picture(self, object_id: ObjectId) -> Picture:
        """Panels of one object."""
        record = self._metrics.index.record(self._rows[object_id[0]])
        category = self._metrics.clicks.facts[object_id].category
        return Picture.of(f"{category} in {record['file_name']}", lambda: self._panels(record, object_id))

    def _panels(self, record: Mapping[str, Any], object_id: ObjectId) -> list[Panel]:
        number = object_id[1]
        size_hw = (record["height"], record["width"])
        image_HW3 = read_annotated_image(record)
        truth = encode_mask_at(record["annotations"][number]["segmentation"], size_hw)
        assert truth is not None, "what was clicked on has a mask"
        fact, run = self._metrics.clicks.facts[object_id], self._runs[object_id]
        masks = dict(sorted(fact.shown.items()))
        part = shown_part([truth, *masks.values()], run.clicks[: max(masks, default=0)])
        panels = []
        for count, mask in masks.items():
            drawn = draw_clicks(image_HW3, truth, mask, run.clicks[:count], part, panel_side_px(self._num_panels))
            made = min(count, len(run.clicks))
            caption = f"{made} click{'s' if made != 1 else ''}: IoU {score(float(run.ious[made]))}"
            jpeg = encode_within(drawn, PICTURE_BYTES // self._num_panels)
            panels.append(Panel("plain", caption, (drawn.shape[0], drawn.shape[1]), jpeg))
            if len(run.clicks) <= count:
                break
        return panels


def shown_part(masks: Sequence[Rle], clicks: Sequence[Click]) -> tuple[slice, slice]:
    """Rows and columns of the image around all masks, of which one has a pixel, and clicks, with a margin."""
    height, width = masks[0]["size"]
    seen = [rle_box_xyxy(rle) for rle in masks if rle_area_px(rle)]
    seen += [(int(click.x), int(click.y), int(click.x) + 1, int(click.y) + 1) for click in clicks]
    boxes_xyxy = np.array(seen, dtype=int)
    (x0, y0), (x1, y1) = boxes_xyxy[:, :2].min(axis=0), boxes_xyxy[:, 2:].max(axis=0)
    margin = max(_LEAST_MARGIN_PX, math.ceil(_MARGIN * max(x1 - x0, y1 - y0)))
    return (
        slice(int(max(0, y0 - margin)), int(min(height, y1 + margin))),
        slice(int(max(0, x0 - margin)), int(min(width, x1 + margin))),
    )


def draw_clicks(
    image_HW3: np.ndarray,
    truth: Rle,
    mask: Rle,
    clicks: Sequence[Click],
    part: tuple[slice, slice],
    side_px: int,
) -> np.ndarray:
    """Part of an image, uint8 RGB, whose longer side becomes `side_px` at most: mask, true outline and clicks on it."""
    rows, columns = part
    canvas = fit_side(image_HW3[part], side_px)
    size_hw = (canvas.shape[0], canvas.shape[1])
    window = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
    small_truth, small_mask = (
        resized_labels(decode_window(one, *window).astype(np.uint8), size_hw) for one in (truth, mask)
    )
    canvas = draw_instances(canvas, [Marked("", small_mask)], colours_rgb=MASK_RGB, show_labels=False, min_side=1)
    stroke = max(2, round(min(size_hw) / 300))
    outlines = cv2.findContours(small_truth, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(canvas, outlines, -1, TRUTH_RGB, stroke, cv2.LINE_AA)
    radius = max(5, round(max(size_hw) / 60))
    left, top, width, height = window
    scale_y, scale_x = size_hw[0] / height, size_hw[1] / width
    for click in clicks:
        centre = (round((click.x + 0.5 - left) * scale_x), round((click.y + 0.5 - top) * scale_y))
        cv2.circle(canvas, centre, radius + 2, _WHITE, -1, cv2.LINE_AA)
        cv2.circle(canvas, centre, radius, IN_RGB if click.label else OUT_RGB, -1, cv2.LINE_AA)
        sign = cv2.MARKER_CROSS if click.label else cv2.MARKER_TILTED_CROSS
        cv2.drawMarker(canvas, centre, _WHITE, sign, radius + 2, max(1, radius // 4), cv2.LINE_AA)
    return canvas
