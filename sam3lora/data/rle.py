"""COCO run-length masks (RLE): strict reading of compressed and uncompressed ones, and writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def decode_counts(text: str) -> list[int]:
    """Run lengths of a compressed COCO RLE string (5 bits per character, as differences from the run before the last).

    pycocotools reads malformed strings without an error, so strings from other sources are checked here.

    Raises:
        ValueError: The string ends inside a number, or has a character that the code does not use.

    >>> decode_counts("52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        bits = ord(char) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {char!r} cannot occur in a compressed RLE")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = shift = 0
    if shift:
        raise ValueError("the compressed RLE is cut off")
    return counts


def read_rle(segmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Check a COCO RLE, compressed or not, and return it in the form that pycocotools expects.

    Returns:
        `{"size": [height, width], "counts": bytes}`.

    Raises:
        ValueError: The size is missing, or the runs are negative or do not add up to height x width.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"expected size [height, width], got {size!r}")
    height, width = size
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    runs = decode_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, Sequence) or not all(isinstance(n, int) and n >= 0 for n in runs):
        raise ValueError("expected counts as a list of non-negative integers or a string")
    if sum(runs) != height * width:
        raise ValueError(f"the runs cover {sum(runs)} pixels, expected {height} x {width} = {height * width}")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode("ascii")}
    return coco_mask.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a boolean mask, ready for JSON.

    >>> encode_rle(np.array([[True, False]]))
    {'size': [1, 2], 'counts': '011'}
    """
    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
