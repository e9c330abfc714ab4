"""Pictures of dense predictions for reports: image, labels, prediction and errors side by side.

Shapes: `M` label maps of an image, `H` `W` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from sam3lora.data.images import read_annotated_image
from sam3lora.data.label_palette import palette_rgb
from sam3lora.evaluation.dense.measure import DenseMetrics
from sam3lora.evaluation.report.html_page import score
from sam3lora.evaluation.report.pictures import (
    PICTURE_BYTES,
    Panel,
    Picture,
    encode_within,
    fit_side,
    panel_side_px,
)
from sam3lora.inference.drawing import Rgb
from sam3lora.label_values import BACKGROUND, IGNORE

RIGHT, MISSED, TOO_MUCH, OTHER_CLASS = range(1, 5)
ERRORS: dict[str, Rgb] = {
    "right": (0, 158, 115),
    "missed": (0, 114, 178),
    "too much": (213, 94, 0),
    "other class": (230, 159, 0),
    "not judged": (0, 0, 0),
}
"""Colours (Okabe and Ito) of the values 1 to 4 of an error map, and of ignored pixels."""

_FILL = 0.7
_VISIBLE = 0.3  # part of a pixel that a label must cover to be drawn there; low, so that thin cracks stay


class DenseGallery:
    """Draws images of a split with the labels and with what one model or several say, of one also the errors.

    The number of pictures decides their size.
    """

    def __init__(self, results: Sequence[DenseMetrics], num_pictures: int) -> None:
        self._results = results
        index = results[0].index
        self._rows = {image_id: row for row, image_id in enumerate(index.table.column("image_id").to_pylist())}
        self._num_panels = max(1, num_pictures * (3 + len(results)))
        self._qualities = [dict(zip(one.meter.image_ids, one.meter.quality().tolist(), strict=True)) for one in results]
        self._colours = picture_colours()
        self._error_colours = np.zeros_like(self._colours)
        self._error_colours[RIGHT : OTHER_CLASS + 1] = list(ERRORS.values())[:-1]
        self._error_colours[IGNORE] = ERRORS["not judged"]

    def picture(self, image_id: int) -> Picture:
        """Panels of one image."""
        record = self._results[0].index.record(self._rows[image_id])
        return Picture.of(record["file_name"], lambda: self._panels(record))

    def _panels(self, record: Mapping[str, Any]) -> list[Panel]:
        first, image_id = self._results[0], record["image_id"]
        pixels_HW3 = fit_side(read_annotated_image(record), panel_side_px(self._num_panels))
        pale_HW3 = pale(pixels_HW3)
        truth_MHW = first.labels.of_record(record)
        panels = [
            self._panel("image", pixels_HW3),
            self._panel("labels", tinted(pale_HW3, flat_labels(truth_MHW), self._colours)),
        ]
        alone = len(self._results) == 1
        for one, qualities in zip(self._results, self._qualities, strict=True):
            assert one.predictions is not None, "the predictions were not kept"
            predicted_MHW = one.predictions.labels(image_id)
            name = "prediction" if alone else one.label
            panels.append(
                self._panel(
                    f"{name}: IoU {score(None if math.isnan(qualities[image_id]) else qualities[image_id])}",
                    tinted(pale_HW3, flat_labels(predicted_MHW), self._colours),
                )
            )
            if alone:
                errors_HW = error_map(predicted_MHW, truth_MHW)
                panels.append(self._panel("errors", tinted(pale_HW3, errors_HW, self._error_colours)))
        return panels

    def _panel(self, caption: str, pixels_HW3: np.ndarray) -> Panel:
        size_hw = (pixels_HW3.shape[0], pixels_HW3.shape[1])
        # No mark of a model: colours are those of classes.
        return Panel("plain", caption, size_hw, encode_within(pixels_HW3, PICTURE_BYTES // self._num_panels))


def picture_colours() -> np.ndarray:
    """uint8 (256, 3): the colours of label values, those of the label maps but for ignored pixels."""
    colours = palette_rgb()
    colours[IGNORE] = ERRORS["not judged"]
    return colours


def flat_labels(labels_MHW: np.ndarray) -> np.ndarray:
    """One map (H, W) with the values of all: where classes overlap, the one with fewer pixels is on top."""
    if len(labels_MHW) == 1:
        return labels_MHW[0]
    flat_HW = np.zeros(labels_MHW.shape[1:], np.uint8)
    flat_HW[(labels_MHW == IGNORE).any(axis=0)] = IGNORE
    sizes = (labels_MHW == 1).sum(axis=(1, 2))
    for number in np.argsort(-sizes, kind="stable"):
        flat_HW[labels_MHW[number] == 1] = number + 1
    return flat_HW


def error_map(predicted_MHW: np.ndarray, truth_MHW: np.ndarray) -> np.ndarray:
    """uint8 (H, W): `RIGHT`, `MISSED`, `TOO_MUCH`, `OTHER_CLASS`, `IGNORE`, and 0 where all is background.

    Of several maps an error counts before what is right, and a class too much with another missed is `OTHER_CLASS`.
    """
    valid_MHW = truth_MHW != IGNORE
    differs_MHW = valid_MHW & (predicted_MHW != truth_MHW)
    missed_HW = (differs_MHW & (truth_MHW != BACKGROUND)).any(axis=0)
    extra_HW = (differs_MHW & (predicted_MHW != BACKGROUND)).any(axis=0)
    right_HW = (valid_MHW & ~differs_MHW & (truth_MHW != BACKGROUND)).any(axis=0)
    errors_HW = np.where(right_HW, RIGHT, 0).astype(np.uint8)
    errors_HW[missed_HW] = MISSED
    errors_HW[extra_HW] = TOO_MUCH
    errors_HW[missed_HW & extra_HW] = OTHER_CLASS
    errors_HW[~valid_MHW.any(axis=0)] = IGNORE
    return errors_HW


def pale(pixels_HW3: np.ndarray) -> np.ndarray:
    """The image in light greys, on which all colours of the palette show: they are dark, and one of them is grey."""
    return np.repeat(cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2) // 3 + 170


def tinted(pixels_HW3: np.ndarray, labels_HW: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The image with the colour of each label over it; the label map may have another size, the background has none."""
    labels_HW = resized_labels(labels_HW, (pixels_HW3.shape[0], pixels_HW3.shape[1]))
    mixed = cv2.addWeighted(pixels_HW3, 1 - _FILL, colours[labels_HW], _FILL, 0)
    return np.where((labels_HW == BACKGROUND)[..., None], pixels_HW3, mixed)


def resized_labels(labels_HW: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A label map at another size. A label that covers a good part of a smaller pixel stays, so that thin things do."""
    if size_hw[0] >= labels_HW.shape[0]:
        return cv2.resize(labels_HW, size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    resized_HW = np.zeros(size_hw, np.uint8)
    most_HW = np.full(size_hw, _VISIBLE * 255, np.float32)
    for value in np.unique(labels_HW[labels_HW != BACKGROUND]):
        is_value_HW = (labels_HW == value).astype(np.uint8) * 255
        coverage_HW = cv2.resize(is_value_HW, size_hw[::-1], interpolation=cv2.INTER_AREA)
        better_HW = coverage_HW >= most_HW
        resized_HW[better_HW] = value
        most_HW[better_HW] = coverage_HW[better_HW]
    return resized_HW
