"""The brush code, by the frontend's reader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "label_studio"))

from brush_rle import encode_brush_rle


def decode_brush_rle(code: list[int]) -> np.ndarray:
    """The reader of Label Studio's frontend (`decode` of rle-pack), line by line."""
    bits = "".join(f"{byte:08b}" for byte in code)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    num = read(32)
    word_size = read(5) + 1
    rle_sizes = [read(4) + 1 for _ in range(4)]
    out = np.zeros(num, dtype=np.uint8)
    i = 0
    while i < num:
        is_run = read(1)
        j = i + 1 + read(rle_sizes[read(2)])
        if is_run:
            out[i:j] = read(word_size)
            i = j
        else:
            for i in range(i, j):  # noqa: B020
                out[i] = read(word_size)
            i = j
    assert len(bits) - position < 8
    return out


def masks() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    yield np.zeros((3, 5), bool)
    yield np.ones((1, 1), bool)
    yield np.ones((300, 200), bool)  # runs longer than 2 ** 16 are cut
    yield np.arange(2**14 + 1)[None] > 0  # exactly 2 ** 16 values, after 4
    for length in (2, 4, 5, 64, 65):  # runs at the edges of the four widths
        yield np.tile(np.repeat([True, False], length), 3)[None]
    for density in (0.02, 0.5, 0.98):
        yield rng.random((37, 23)) < density


@pytest.mark.parametrize("mask_HW", list(masks()), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_the_frontend_reads_the_same_mask(mask_HW):
    rgba = decode_brush_rle(encode_brush_rle(mask_HW)).reshape(*mask_HW.shape, 4)
    np.testing.assert_array_equal(rgba, np.repeat(mask_HW[..., None] * np.uint8(255), 4, axis=-1))
