"""Format and size of an image file, read from its header before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from sam3lora.data.images import exif_orientation
from serve_app.http.errors import ServeError

_TURNED = frozenset((5, 6, 7, 8))  # EXIF orientations that exchange width and height
_SAME_FORMAT = {"MPO": "JPEG"}  # a phone's JPEG with previews behind it

Image.init()
warnings.filterwarnings("ignore", module=r"PIL\.")  # our errors say the same


class ImageHeader(NamedTuple):
    """`size_hw` is the size after the EXIF orientation is applied."""

    format: str
    size_hw: tuple[int, int]


def read_header(data: bytes, *, formats: Sequence[str], max_megapixels: float) -> ImageHeader:
    """Read format and size. Only the decoders of the given formats see the data. Takes milliseconds: use a thread.

    Raises:
        ServeError: `unsupported_image`, `invalid_image`, or `image_too_large`.
    """
    if not data:
        raise ServeError("invalid_image", "the image is empty: send the file's content")
    claimed = _claimed_format(data)
    try:
        with Image.open(io.BytesIO(data), formats=list(formats)) as image:
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise _too_large(f"has {width} x {height} pixels", max_megapixels)
            format = _SAME_FORMAT.get(str(image.format), str(image.format))
            turned = exif_orientation(image, data) in _TURNED
            return ImageHeader(format, (width, height) if turned else (height, width))
    except Image.DecompressionBombError:
        raise _too_large("has too many pixels", max_megapixels) from None
    except ServeError:
        raise
    except Exception:  # broken headers raise errors of many kinds
        if claimed in formats:
            message = f"the image begins like {claimed} but its header cannot be read: is the file whole?"
            raise ServeError("invalid_image", message) from None
        found = f"is {claimed}" if claimed else "is of no known format"
        message = f"the image {found}; expected {', '.join(formats)}: convert it first"
        raise ServeError("unsupported_image", message) from None


def _claimed_format(data: bytes) -> str | None:
    """The format whose signature the data has."""
    prefix = data[:16]
    for name, (_, accept) in Image.OPEN.items():
        try:
            if accept is not None and accept(prefix) is True:
                return name
        except Exception:  # some need a longer prefix
            continue
    return None


def _too_large(found: str, max_megapixels: float) -> ServeError:
    message = f"the image {found}, expected at most {max_megapixels:g} million: cut it into tiles or make it smaller"
    return ServeError("image_too_large", message)
