"""Labels of an image from the logits of a dense adapter, in the form that a request asks for."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from PIL import Image

from sam3lora.data.label_palette import palette_image
from sam3lora.data.rle import encode_rle
from sam3lora.inference.dense.files import encode_png
from sam3lora.inference.dense.result import DenseResult
from sam3lora.model.dense.settings import DenseSettings
from serve_app.http.errors import ServeError, answer_too_large
from serve_app.messages import DenseCall, LabelledClass, LabelOutput
from serve_app.replica.mask_encoder import StoppedError

LARGE_PIXELS = 4_000_000
"""Of an image whose labels take hundreds of megabytes to make: maps of several classes in float32."""


class WantedLabels(NamedTuple):
    """What a request wants of its adapter, whose settings have the threshold that counts."""

    settings: DenseSettings
    output: LabelOutput
    names: tuple[str, ...]


class Labels(NamedTuple):
    classes: list[LabelledClass]
    label_png: bytes | None


def wanted_labels(call: DenseCall, recorded: DenseSettings) -> WantedLabels:
    """What a call wants of the adapter that recorded these settings.

    Raises:
        ServeError: The adapter cannot give what is wanted.
    """
    overlap = recorded.mode == "multilabel"
    if overlap and call.output == "label_png":
        message = "classes of this adapter may overlap, so its pixels have no one label: ask for rle or probability_png"
        raise ServeError("invalid_request", message, field="output")
    if recorded.mode == "multiclass" and call.threshold is not None:
        message = (
            "threshold has no effect: classes of this adapter exclude each other, and the most probable one counts"
        )
        raise ServeError("invalid_request", message, field="threshold")
    for number, name in enumerate(call.classes or ()):
        if name not in recorded.classes:
            field = f"classes[{number}]"
            message = f"{field} is no class of adapter {call.adapter!r}: GET /v1/adapters lists them"
            raise ServeError("invalid_request", message, field=field)
    settings = recorded
    if call.threshold is not None:
        settings = DenseSettings(**(recorded.to_dict() | {"threshold": call.threshold}))
    output = call.output or ("rle" if overlap else "label_png")
    return WantedLabels(settings, output, recorded.classes if call.classes is None else call.classes)


def make_labels(
    logits_Nhw: np.ndarray, size_hw: tuple[int, int], wanted: WantedLabels, most_bytes: int, stop: threading.Event
) -> Labels:
    """In a thread; can stop between two classes.

    Raises:
        ServeError: The answer has more than `most_bytes`.
        StoppedError: `stop` is set.
    """
    settings, output, names = wanted
    result = DenseResult(settings, size_hw, logits_Nhw)
    num_pixels, num_bytes = size_hw[0] * size_hw[1], 0
    classes = []
    for name in names:
        if stop.is_set():
            raise StoppedError
        mask_HW = result.mask(name)
        area_px = int(np.count_nonzero(mask_HW))
        mask: dict | bytes | None = None
        if output == "rle":
            mask = encode_rle(mask_HW)
            num_bytes += len(mask["counts"])
        elif output == "probability_png":
            mask = encode_png(Image.fromarray(np.rint(result.probability(name) * 255).astype(np.uint8)))
            num_bytes += len(mask)
        if num_bytes > most_bytes:
            raise answer_too_large(num_bytes, most_bytes, "ask for fewer classes")
        value = settings.value(name) if output == "label_png" else None
        classes.append(LabelledClass(name, area_px, round(area_px / num_pixels, 6), value, mask))
    return Labels(classes, _label_png(result, names) if output == "label_png" else None)


def _label_png(result: DenseResult, names: tuple[str, ...]) -> bytes:
    """The label map, in which pixels of other classes are 0."""
    assert result.label_HW is not None
    shown = np.zeros(256, dtype=np.uint8)
    for name in names:
        shown[result.settings.value(name)] = result.settings.value(name)
    return encode_png(palette_image(shown[result.label_HW]))
