"""Brush masks as Label Studio's frontend reads them."""

from __future__ import annotations

import numpy as np


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
