"""Format and size of an image file, from its header, before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from sam3lora.data.images import exif_orientation, png_chunks
from serve_app.http.errors import ServeError

MAX_READS = 2_000
MAX_READ_BYTES = 4 * 2**20
"""Of the pieces in which Pillow reads a header: its parsers are Python, and a byte may cost them a microsecond."""

MAX_COMPRESSED_CHUNKS = 16
"""Of a PNG: each of a kilobyte may become a megabyte."""

_TURNED = frozenset((5, 6, 7, 8))  # EXIF orientations that exchange width and height
_SAME_FORMAT = {"MPO": "JPEG"}  # a phone's JPEG with previews behind it

Image.init()
warnings.filterwarnings("ignore", module=r"PIL\.")  # our errors say the same


class _LongHeaderError(Exception):
    """There is more before the pixels than a header may hold."""


class HeaderFile(io.BytesIO):
    """An image file of which little may be read piece by piece; decoders that take it whole may do so."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._num_bytes = len(data)
        self._reads_left = MAX_READS
        self._bytes_left = MAX_READ_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if size is not None and size >= 0:
            self._bytes_left -= max(0, min(size, self._num_bytes - self.tell()))
        if self._reads_left < 0 or self._bytes_left < 0:
            raise _LongHeaderError
        return super().read(size)


class ImageHeader(NamedTuple):
    """`size_hw` is the size after the EXIF orientation is applied."""

    format: str
    size_hw: tuple[int, int]


def read_header(data: bytes, *, formats: Sequence[str], max_megapixels: float) -> ImageHeader:
    """Read format and size. Only the decoders of the given formats see the data. Takes milliseconds: use a thread.

    Args:
        data: An image file.
        formats: Pillow's names of the accepted formats.
        max_megapixels: Most pixels, in millions.

    Raises:
        ServeError: `unsupported_image`, `invalid_image`, or `image_too_large`.
    """
    if not data:
        raise ServeError("invalid_image", "the image is empty: send the file's content")
    claimed = _claimed_format(data)
    try:
        if claimed == "PNG":
            _check_compressed_chunks(data)
        with Image.open(HeaderFile(data), formats=list(formats)) as image:
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
    except _LongHeaderError:
        message = (
            "the image holds too much metadata before its pixels: save it again without comments, layers, previews"
        )
        raise ServeError("invalid_image", message) from None
    except Exception:  # broken headers raise errors of many kinds
        if claimed in formats:
            message = f"the image begins like {claimed} but its header cannot be read: is the file whole?"
            raise ServeError("invalid_image", message) from None
        found = f"is {claimed}" if claimed else "is of no known format"
        message = f"the image {found}; expected {', '.join(formats)}: convert it first"
        raise ServeError("unsupported_image", message) from None


def _check_compressed_chunks(data: bytes) -> None:
    kinds = [kind for kind, _, _ in png_chunks(data)]
    if sum(kind in (b"iCCP", b"zTXt", b"iTXt") for kind in kinds) > MAX_COMPRESSED_CHUNKS:
        raise _LongHeaderError


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
