"""The colours of label maps: one for each value, in PNGs and in pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image


def palette_rgb() -> np.ndarray:
    """uint8 (256, 3), the Pascal VOC palette: the bits of the value go to red, green and blue in turn; 0 is black.

    >>> palette_rgb()[:4].tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    values = np.arange(256)
    channels = [sum(((values >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def palette_image(labels_HW: np.ndarray) -> Image.Image:
    """A label map, uint8, as an image whose pixels are the values and whose palette gives their colours."""
    image = Image.fromarray(labels_HW).convert("P")
    image.putpalette(palette_rgb().ravel().tolist())
    return image
