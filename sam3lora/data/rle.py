"""COCO run-length masks (RLE): strict reading, writing, and work on them that does not decode them whole."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.images import MAX_MEGAPIXELS

MAX_CHARS = 7  # of a number: 35 bits, and no mask has 2^32 pixels


def decode_counts(text: str) -> list[int]:
    """Run lengths of a compressed COCO RLE string (5 bits per character, as differences from the run before the last).

    pycocotools reads malformed strings without an error, so strings from other sources are checked here.

    Raises:
        ValueError: The string ends inside a number, or has a character or a number that the code does not use.

    >>> decode_counts("52203")
    [5, 2, 2, 2, 5]
    """
    try:
        bits = np.frombuffer(text.encode("latin-1"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("a compressed RLE has ASCII characters only") from None
    if not bits.size:
        return []
    if bits.min() < 0 or bits.max() > 63:
        raise ValueError(
            f"character {text[int(np.flatnonzero((bits < 0) | (bits > 63))[0])]!r} cannot occur in a compressed RLE"
        )
    is_last = bits < 32
    if not is_last[-1]:
        raise ValueError("the compressed RLE is cut off")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_chars = ends - starts + 1
    if num_chars.max() > MAX_CHARS:
        raise ValueError("the compressed RLE has a number that no mask needs")
    place = np.arange(bits.size) - np.repeat(starts, num_chars)
    counts = np.add.reduceat((bits & 31) << (5 * place), starts)
    counts -= np.where(bits[ends] & 16, 1 << (5 * num_chars), 0)
    for first in (1, 2):  # from the fourth on, each is a difference from the number two before
        counts[first::2] = np.cumsum(counts[first::2])
    return counts.tolist()


def read_rle(segmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Check a COCO RLE, compressed or not, and return it in the form that pycocotools expects.

    Returns:
        `{"size": [height, width], "counts": bytes}`. Only the first run may have no pixel: where two masks have others
        at the same place, pycocotools' `merge` stops and leaves the rest of its answer undefined.

    Raises:
        ValueError: The size is missing or beyond that of any image, or the runs are negative or do not add up to
            height x width.
    """
    size, counts = _whole_numbers(segmentation.get("size")), segmentation.get("counts")
    if size is None or len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected size [height, width], got {str(segmentation.get('size'))[:60]}")
    height, width = size
    if height * width > MAX_MEGAPIXELS * 1e6:
        raise ValueError(f"expected size of an image, at most {MAX_MEGAPIXELS} million pixels, got {width} x {height}")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    runs = decode_counts(counts) if isinstance(counts, str) else _whole_numbers(counts)
    if runs is None or min(runs, default=0) < 0:
        raise ValueError("expected counts as a list of whole numbers, none negative, or a string")
    if sum(runs) != height * width:
        raise ValueError(f"the runs cover {sum(runs)} pixels, expected {height} x {width} = {height * width}")
    if 0 in runs[1:]:
        runs = _joined(runs)
    elif isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode("ascii")}
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)


def _joined(runs: Sequence[int]) -> list[int]:
    """The same mask in runs of which only the first may have no pixel.

    >>> _joined([2, 3, 0, 2, 5, 0])
    [2, 5, 5]
    """
    of_pixels = ((number % 2, run) for number, run in enumerate(runs) if run)
    joined = [(inside, sum(run for _, run in group)) for inside, group in itertools.groupby(of_pixels, itemgetter(0))]
    return [0] * joined[0][0] + [run for _, run in joined]


def _whole_numbers(values: Any) -> list[int] | None:
    """Numbers as integers, also those written as 5.0; None if any is not whole."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return None
    for value in values:
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            return None
    return [int(value) for value in values]


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a boolean mask, ready for JSON.

    >>> encode_rle(np.array([[True, False]]))
    {'size': [1, 2], 'counts': '011'}
    """
    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def rle_difference(rle: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """The pixels of a mask that are in none of the others. None of them is decoded.

    Raises:
        ValueError: The masks have different sizes.

    >>> first, second = (encode_rle(np.array([pixels])) for pixels in ([True, True, False], [False, True, True]))
    >>> rle_difference(first, second) == coco_mask.encode(np.array([[1, 0, 0]], dtype=np.uint8, order="F"))
    True
    """
    for one in others:
        if list(one["size"]) != list(rle["size"]):
            raise ValueError(f"expected masks of one size [height, width], got {rle['size']} and {one['size']}")
    return coco_mask.merge([rle, *map(_inverted, others)], intersect=True)


def decode_window(rle: Mapping[str, Any], x: int, y: int, width: int, height: int) -> np.ndarray:
    """The part of a mask in a box within it, bool (height, width); memory grows with the box and the mask's outline.

    >>> decode_window(encode_rle(np.eye(4, dtype=bool)), 1, 0, 3, 2)
    array([[False, False, False],
           [ True, False, False]])
    """
    column, row = np.divmod(np.cumsum(_runs(rle)), rle["size"][0])
    # Of the window's pixels, column by column, so many come before the first one after each run.
    is_beside = (column < x) | (column >= x + width)
    before = (column - x).clip(0, width) * height + np.where(is_beside, 0, (row - y).clip(0, height))
    runs = np.diff(before, prepend=0)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _inverted(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Every pixel that is not in the mask."""
    runs = _runs(rle)
    runs = runs[1:] if runs[0] == 0 else [0, *runs]
    return coco_mask.frPyObjects({"size": list(rle["size"]), "counts": runs}, *rle["size"])


def _runs(rle: Mapping[str, Any]) -> list[int]:
    """Lengths of the runs, the first one outside of the mask."""
    counts = rle["counts"]
    return decode_counts(counts.decode("ascii") if isinstance(counts, bytes) else counts)
