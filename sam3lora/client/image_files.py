"""Images that are uploaded, and the conversion of paths, arrays and PIL images to image files."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class UploadedImage:
    """An image that the service keeps: further calls neither send nor encode it again.

    Attributes:
        image_id: The service's name for it.
        size_hw: Height and width in pixels; None if you made this from an id alone.
        data: The image file, which is sent again if the service has evicted it; None if not available.
    """

    image_id: str
    size_hw: tuple[int, int] | None = None
    data: bytes | None = field(default=None, repr=False)


def image_bytes(image: ImageSource) -> bytes:
    """An image file: a path's or the given bytes unchanged, or a lossless PNG of a PIL image (turned as its EXIF data
    say) or of an array, uint8 (H, W, 3) RGB.

    Raises:
        OSError: The file cannot be read.
        TypeError: It has another type.
        ValueError: The array is not uint8 (H, W, 3).
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return file.read()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"expected an RGB array uint8 (H, W, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        kinds = "a path, bytes, a PIL image, a uint8 RGB array or an UploadedImage"
        raise TypeError(f"expected {kinds}, got {type(image).__name__}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    png = io.BytesIO()
    upright.save(png, format="PNG", compress_level=1)
    return png.getvalue()
