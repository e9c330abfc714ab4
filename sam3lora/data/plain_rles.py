"""Compressed run-length masks that need no cleaning, found in bulk; one by one see `sam3lora.data.rle`.

Shapes: `A` masks, `C` characters, `R` runs of all masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from sam3lora.data.rle import MAX_CHARS

_MAX_RUN = 2**31


class _Rle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str


decoder = msgspec.json.Decoder(list[_Rle])


def measure_rles(rles: Sequence[_Rle], sizes_hw_A2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes xyxy (A, 4) of masks, and which of them (A,) are those of their images' sizes, undamaged and not empty."""
    boxes_A4, is_good_A = np.full((len(rles), 4), np.nan), np.zeros(len(rles), dtype=bool)
    same_A = (np.array([rle.size for rle in rles]) == sizes_hw_A2).all(axis=1)
    rows = [row for row, rle in enumerate(rles) if same_A[row] and rle.counts.isascii() and rle.counts]
    if rows:
        heights, areas = sizes_hw_A2[rows, 0], sizes_hw_A2[rows].prod(axis=1)
        boxes_A4[rows], is_good_A[rows] = _measure([rles[row].counts for row in rows], heights, areas)
    return boxes_A4, is_good_A


def _measure(texts: Sequence[str], heights_A: np.ndarray, areas_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    runs_R, mask_R, place_R, is_good_A = _decode(texts)
    total_A = np.bincount(mask_R, weights=runs_R, minlength=len(texts))
    is_good_A &= (total_A == areas_A) & (np.bincount(mask_R, weights=runs_R < 0, minlength=len(texts)) == 0)
    ends_R = np.cumsum(runs_R)
    first_R = np.searchsorted(mask_R, np.arange(len(texts)))
    ends_R -= (ends_R[first_R] - runs_R[first_R])[mask_R]  # counted from the start of each mask
    ones = np.flatnonzero((place_R % 2 == 1) & (runs_R > 0) & is_good_A[mask_R])
    owner, height = mask_R[ones], heights_A[mask_R[ones]]
    first, last = ends_R[ones] - runs_R[ones], ends_R[ones] - 1  # pixels in columns from top to bottom
    whole_column = first // height < last // height
    top, bottom = np.where(whole_column, 0, first % height), np.where(whole_column, height - 1, last % height)
    owners, starts = np.unique(owner, return_index=True)
    box_A4 = np.full((len(texts), 4), np.nan)
    if len(owners):
        sides = (
            (np.minimum, first // height),
            (np.minimum, top),
            (np.maximum, last // height + 1),
            (np.maximum, bottom + 1),
        )
        for column, (extreme, values) in enumerate(sides):
            box_A4[owners, column] = extreme.reduceat(values, starts)
    return box_A4, is_good_A & np.isfinite(box_A4).all(axis=1)


def _decode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All runs (R,), the mask and the place in it of each, and which masks (A,) have a readable text.

    The code is that of `sam3lora.data.rle.decode_counts`.
    """
    length_A = np.fromiter(map(len, texts), np.int64, len(texts))
    bits_C = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    text_C = np.repeat(np.arange(len(texts)), length_A)
    is_bad_C = (bits_C < 0) | (bits_C > 63)
    is_last_C = bits_C < 32
    is_good_A = np.bincount(text_C, weights=is_bad_C, minlength=len(texts)) == 0
    is_good_A &= is_last_C[np.cumsum(length_A) - 1]
    is_last_C[np.cumsum(length_A) - 1] = True
    ends_R = np.flatnonzero(is_last_C)
    starts_R = np.concatenate([[0], ends_R[:-1] + 1])
    num_chars_R = ends_R - starts_R + 1
    mask_R = text_C[ends_R]
    is_good_A[mask_R[num_chars_R > MAX_CHARS]] = False
    shift_C = 5 * np.minimum(np.arange(len(bits_C)) - np.repeat(starts_R, num_chars_R), MAX_CHARS)
    runs_R = np.add.reduceat((bits_C & 31) << shift_C, starts_R)
    runs_R -= np.where(bits_C[ends_R] & 16, 1 << (5 * np.minimum(num_chars_R, MAX_CHARS)), 0)
    num_runs_A = np.bincount(mask_R, minlength=len(texts))
    place_R = np.arange(len(runs_R)) - np.repeat(np.cumsum(num_runs_A) - num_runs_A, num_runs_A)
    return _sum_differences(runs_R, mask_R, place_R), mask_R, place_R, is_good_A


def _sum_differences(runs_R: np.ndarray, mask_R: np.ndarray, place_R: np.ndarray) -> np.ndarray:
    """From the fourth run of a mask on, each is the difference from the run two before."""
    chain_R = 3 * mask_R + np.where(place_R == 0, 0, 1 + place_R % 2)
    order = np.argsort(chain_R, kind="stable")
    sums_R = np.cumsum(runs_R[order])
    starts = np.flatnonzero(np.diff(chain_R[order], prepend=-1))
    before_R = np.repeat(sums_R[starts] - runs_R[order][starts], np.diff(starts, append=len(order)))
    summed_R = np.empty_like(runs_R)
    summed_R[order] = sums_R - before_R
    return np.clip(summed_R, -1, _MAX_RUN)
