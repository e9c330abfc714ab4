"""Label Studio's run-length code of a brush mask: `rle-pack` of an RGBA image, as its frontend reads it."""

from __future__ import annotations

import numpy as np

RUN_BITS = (3, 4, 8, 16)  # the four widths that a run's length may be written in


def encode_brush_rle(mask_HW: np.ndarray) -> list[int]:
    """Bytes of `value.rle` for a bool mask (H, W): all four channels are 255 inside and 0 outside.

    A header (32 bits: number of values; 5 bits: width of a value - 1; 4 times 4 bits: the run widths - 1), then for
    each run a 1, which of the widths (2 bits), its length - 1 and its value; zeros up to the next byte.
    """
    flat = np.asarray(mask_HW, dtype=bool).ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size)) * 4
    bits = [f"{flat.size * 4:032b}", f"{8 - 1:05b}", *(f"{width - 1:04b}" for width in RUN_BITS)]
    for length, inside in zip(lengths.tolist(), flat[starts].tolist(), strict=True):
        while length:
            piece = min(length, 2 ** RUN_BITS[-1])
            which = next(number for number, width in enumerate(RUN_BITS) if piece <= 2**width)
            bits.append(f"1{which:02b}{piece - 1:0{RUN_BITS[which]}b}{255 * inside:08b}")
            length -= piece
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return list(int(code, 2).to_bytes(len(code) // 8, "big"))
