"""Image files to RGB arrays, and resizing as SAM 3's image processor does it."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sam3lora.errors import UserError

_DECODE_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


class ImageError(UserError):
    """An image that is missing or cannot be decoded; the message names the file."""


def read_image(source: str | Path | bytes, expected_size_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to RGB.

    - The content decides the format, not the file's extension.
    - Grey and palette images become RGB, an alpha channel is dropped (as PIL's `convert("RGB")`), CMYK is converted.
    - 16-bit values are scaled by 255 / 65535 over their whole range, without stretching.
    - EXIF orientation is ignored, because annotations refer to the stored pixels. The exception: the expected size is
      the rotated one and not the stored one, so the annotations were made on the rotated picture.

    Args:
        source: Path, or the bytes of a file.
        expected_size_hw: Height and width that the annotations refer to, if known.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ImageError: Missing, empty, truncated, floating point, or no known image format.
    """
    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read image {name}: {error.strerror or error}") from None
    if not data:
        raise ImageError(f"cannot read image {name}: the file is empty")
    image = _decode(data, name)
    if expected_size_hw is not None and image.shape[:2] != tuple(expected_size_hw):
        image = _orient_if_expected(image, data, expected_size_hw)
    return image


def read_size(path: str | Path) -> tuple[int, int]:
    """Stored (height, width) from the file's header, without decoding.

    Raises:
        ImageError: Missing or no known image format.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read image {path}: {_reason(error)}") from None


def resize_image(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize to what `Sam3ImageProcessor` gives: antialiased bilinear on uint8 (torchvision v2).

    Mean absolute difference to it in grey levels (worst of 23 photographs), and milliseconds from 640 x 640:

        scale                     0.3         0.5         0.75        1.575       3.0
        OpenCV INTER_LINEAR       10.2        4.75        2.84        0.23  1.1   0.11   3.2
        OpenCV INTER_AREA         2.78        4.75        1.86        (enlarging: as linear)
        Gaussian blur + LINEAR    0.78  1.5   0.57  0.9   2.49
        PIL BILINEAR              0.01  2.0   0.00  2.4   0.00  3.4   0.02  8.3   0.00  25.3

    So OpenCV enlarges (never more than one level off) and PIL shrinks.

    Args:
        image: uint8 (H, W, 3).
        size_hw: New height and width.

    Returns:
        uint8 (size_hw[0], size_hw[1], 3); the same array when the size is the same.
    """
    height, width = image.shape[:2]
    size_wh = (size_hw[1], size_hw[0])
    if (width, height) == size_wh:
        return image
    if size_hw[0] >= height and size_hw[1] >= width:
        return cv2.resize(image, size_wh, interpolation=cv2.INTER_LINEAR)
    resized = Image.fromarray(image).resize(size_wh, Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _DECODE_FLAGS)
    except cv2.error:
        image = None
    if image is None:
        return _decode_with_pil(data, name)
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ImageError(f"cannot read image {name}: {image.dtype} pixels; convert it to 8 or 16 bit first")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_with_pil(data: bytes, name: str) -> np.ndarray:
    """Formats that this build of OpenCV lacks; also the judge of what is broken."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("F", "I"):
                raise ImageError(f"cannot read image {name}: pixels of mode {image.mode}; convert it to 8 or 16 bit")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read image {name}: {_reason(error)}") from None


def _orient_if_expected(image: np.ndarray, data: bytes, expected_size_hw: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] != tuple(expected_size_hw)[::-1]:
        return image
    try:
        with Image.open(io.BytesIO(data)) as header:
            exif = header.getexif()
    except (OSError, ValueError, SyntaxError):
        return image
    if exif.get(ExifTags.Base.Orientation, 1) not in (5, 6, 7, 8):
        return image
    turned = Image.fromarray(image)
    turned.getexif()[ExifTags.Base.Orientation] = exif[ExifTags.Base.Orientation]
    return np.array(ImageOps.exif_transpose(turned))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
