"""Small images and label folders for the tests of conversions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet
from sam3lora.data.faults import FaultLog


def write_image(path: Path, size_wh=(80, 60), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh, (90, 120, 150)).save(path, **options)
    return path


def read_set(reader: Callable, root: Path, names=None, **options) -> tuple[LabelledSet, dict[str, int]]:
    """A data set and the counts of its faults by kind."""
    log = FaultLog()
    return reader(root, names, log, **options), counts(log)


def read_first(reader: Callable, root: Path, names=None, **options) -> tuple[LabelledImage, dict[str, int]]:
    """The first image of the only split, and the counts of faults by kind."""
    labelled, faults = read_set(reader, root, names, **options)
    [images] = labelled.splits.values()
    return images[0], faults


def counts(log: FaultLog) -> dict[str, int]:
    return {fault.kind: fault.count for fault in log}


def mask_with(*pixels: tuple, size_hw=(6, 8), dtype=bool, value=True) -> np.ndarray:
    """A mask with these pixels or slices set."""
    mask_HW = np.zeros(size_hw, dtype=dtype)
    for pixel in pixels:
        mask_HW[pixel] = value
    return mask_HW
