"""Reading image files into RGB arrays, and resizing them as SAM 3's image processor does."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sam3lora.errors import UserError

MAX_MEGAPIXELS = 178
"""Default limit on the size of an image; Pillow refuses larger ones as well."""

MAX_PNG_CHUNKS = 20_000
"""Encoders write chunks of 8 KB or more; EXIF data behind so many are not looked for."""

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Lower-case suffixes of the files in a folder that count as images."""

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # its warnings repeat our errors

_DECODE_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
_CHECK_FLAGS = cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG = b"\xff\xd8"
_TURNED_BY_THE_DECODER = ("TIFF",)
_EXIF_INTEGERS = {1: "B", 3: "H", 4: "I"}
_DECODING_ERRORS = (  # RuntimeError: of a damaged AVIF file, or a kind of DDS file that Pillow does not know
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    Image.DecompressionBombError,
)
_FORMATS_WITH_FRAMES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")  # further frames of a phone's JPEG are previews

# Pillow warns above half of MAX_MEGAPIXELS.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(UserError):
    """An image that is missing or cannot be decoded; the message names the file."""


def read_image(
    source: str | Path | bytes,
    expected_size_hw: tuple[int, int] | None = None,
    *,
    orientation: Literal["stored", "exif"] = "stored",
    max_megapixels: float = MAX_MEGAPIXELS,
) -> np.ndarray:
    """Decode an image to RGB.

    - The content decides the format, not the file's suffix.
    - Grey and palette images become RGB, an alpha channel is dropped (as in PIL's `convert("RGB")`), CMYK is converted.
    - 16-bit values are scaled by 255 / 65535 over their whole range, without stretching.
    - The first frame or page is read; `read_first_frame` also says whether there are more.
    - The size is checked in the header, before anything is decoded.
    - EXIF orientation is ignored, because annotations refer to the stored pixels. The exception: if the expected size
      is that of the rotated picture, the annotations were made on it, and the picture is rotated.

    Args:
        source: Path, or the bytes of a file.
        expected_size_hw: Height and width that the annotations refer to, if known.
        orientation: "exif" turns the picture upright, for images without annotations.
        max_megapixels: Larger images are refused. Above 178, raise `PIL.Image.MAX_IMAGE_PIXELS` as well.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ImageError: The file is missing, empty, too large, truncated, in floating point or in no known image format.
    """
    name, data = _name(source), _read_bytes(source)
    image = _decode_first_frame(data, name, max_megapixels)
    if orientation == "exif":
        return _turn(image, _orientation(data))
    expected = image.shape[:2] if expected_size_hw is None else tuple(expected_size_hw)
    if image.shape[:2] != expected and image.shape[1::-1] == expected:
        turned = _turn(image, _orientation(data))
        return turned if turned.shape[:2] == expected else image
    return image


def read_annotated_image(record: Mapping[str, Any]) -> np.ndarray:
    """The image of a record of an index, brought to the size that its annotations refer to.

    Files of another size are resized copies of the annotated image, so coordinates stay where they were relative to it.

    Returns:
        uint8 (H, W, 3), RGB, with the record's height and width.

    Raises:
        ImageError: See `read_image`.
    """
    size_hw = (record["height"], record["width"])
    return resize_image(read_image(record["path"], expected_size_hw=size_hw), size_hw)


def read_first_frame(source: str | Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[np.ndarray, bool]:
    """Decode the first frame of an image, an animation or a file of several pages, upright; the file is read once.

    Returns:
        uint8 (H, W, 3), RGB, turned as the EXIF orientation says, and whether the file holds more frames.

    Raises:
        ImageError: See `read_image`.
    """
    data = _read_bytes(source)
    image = _decode_first_frame(data, _name(source), max_megapixels)
    return _turn(image, _orientation(data)), _has_more_frames(data, _name(source))


def rgb_from_pil(image: Image.Image, name: str = "image") -> np.ndarray:
    """A PIL image as uint8 (H, W, 3), turned as its EXIF orientation says.

    Raises:
        ImageError: Its pixels are floating point or 32-bit, or its file is truncated.
    """
    try:
        return _convert(ImageOps.exif_transpose(image), name)
    except _DECODING_ERRORS as error:
        raise _image_error(error, name) from None


def read_size(path: str | Path) -> tuple[int, int]:
    """Stored (height, width) from the file's header, without decoding.

    Raises:
        ImageError: The file is missing or in no known image format.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DECODING_ERRORS as error:
        raise ImageError(f"cannot read image {path}: {_reason(error)}") from None


def check_image(source: str | Path | bytes, expected_size_hw: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of what `read_image` gives, and the same errors, in half the time for a JPEG.

    A JPEG is decoded at an eighth of its size and without colours. That still reads all of its data.

    Raises:
        ImageError: As `read_image`.
    """
    data = _read_bytes(source)
    if data.startswith(_JPEG):
        height, width = _check_header(data, _name(source), MAX_MEGAPIXELS)
        try:
            is_whole = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _CHECK_FLAGS) is not None
        except cv2.error:
            is_whole = False
        if is_whole:
            turns = (height, width) != expected_size_hw == (width, height) and _orientation(data) >= 5
            return (width, height) if turns else (height, width)
    height, width = read_image(source, expected_size_hw).shape[:2]  # or its error
    return height, width


def exif_orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8, that OpenCV's decoder does not apply itself; 5 to 8 swap height and width.

    `image` was opened from `data`; it is not decoded.
    """
    if image.format in _TURNED_BY_THE_DECODER:
        return 1
    try:
        if image.format == "PNG":
            exif = _png_exif(data)
            if exif is None and (text := image.info.get("Raw profile type exif")):
                exif = bytes.fromhex("".join(text.split("\n")[3:]))
        else:
            exif = image.info.get("exif")
        orientation = _orientation_in_exif(exif) if exif else None
        if orientation is None:
            orientation = _orientation_in_xmp(image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or "")
        return orientation if orientation is not None and 1 <= orientation <= 8 else 1
    except Exception:  # damaged EXIF data raises errors of many kinds, and counts as none
        return 1


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and number of bytes of the chunks of a PNG file, up to its end, or to `MAX_PNG_CHUNKS`."""
    start = 8
    for _ in range(MAX_PNG_CHUNKS):
        if start + 8 > len(data):
            break
        num_bytes, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start + 8, num_bytes
        if kind == b"IEND":
            break
        start += num_bytes + 12


def _png_exif(data: bytes) -> bytes | None:
    """EXIF data of a PNG file, which may come before or after the pixels; None if there is none."""
    found = (data[start : start + num_bytes] for kind, start, num_bytes in png_chunks(data) if kind == b"eXIf")
    return next(found, None)


def _orientation_in_exif(exif: bytes) -> int | None:
    """The tag of the first directory alone: Pillow would read all tags and what they refer to."""
    tiff = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (num_tags,) = struct.unpack_from(f"{order}H", tiff, start)
    tags = tiff[start + 2 : start + 2 + 12 * num_tags]
    for tag, type, _, value in struct.iter_unpack(f"{order}HHI4s", tags[: len(tags) // 12 * 12]):
        if tag == ExifTags.Base.Orientation and type in _EXIF_INTEGERS:
            return struct.unpack_from(order + _EXIF_INTEGERS[type], value)[0]
    return None


def _orientation_in_xmp(xmp: str | bytes) -> int | None:
    text = xmp.encode() if isinstance(xmp, str) else xmp
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', text)
    return int(found[1]) if found else None


def resize_image(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize uint8 (H, W, 3) as `Sam3ImageProcessor` does: antialiased bilinear (torchvision v2).

    Mean absolute difference to it in grey levels (worst of 23 photographs), and milliseconds from 640 x 640:

        scale                     0.3         0.5         0.75        1.575       3.0
        OpenCV INTER_LINEAR       10.2        4.75        2.84        0.23  1.1   0.11   3.2
        OpenCV INTER_AREA         2.78        4.75        1.86        (enlarging: as linear)
        Gaussian blur + LINEAR    0.78  1.5   0.57  0.9   2.49
        PIL BILINEAR              0.01  2.0   0.00  2.4   0.00  3.4   0.02  8.3   0.00  25.3

    So OpenCV enlarges (at most one level off) and PIL shrinks. An image of the right size is returned as it is.
    """
    height, width = image.shape[:2]
    size_wh = (size_hw[1], size_hw[0])
    if (width, height) == size_wh:
        return image
    if size_hw[0] >= height and size_hw[1] >= width:
        return cv2.resize(image, size_wh, interpolation=cv2.INTER_LINEAR)
    resized = Image.fromarray(image).resize(size_wh, Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _decode_first_frame(data: bytes, name: str, max_megapixels: float) -> np.ndarray:
    _check_header(data, name, max_megapixels)
    return _decode(data, name)


def _check_header(data: bytes, name: str, max_megapixels: float) -> tuple[int, int]:
    """Stored (height, width), within the limit."""
    height, width = _read_header(data, name)
    if height * width > max_megapixels * 1e6:
        raise ImageError(
            f"cannot read image {name}: it has {width} x {height} pixels, expected at most {max_megapixels:g} million: "
            "cut it into tiles or make it smaller"
        )
    return height, width


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _DECODE_FLAGS)
    except cv2.error:
        image = None
    if image is None:
        return _decode_with_pil(data, name)
    if image.dtype == np.uint16:
        image = _to_8_bit(image)
    if image.dtype != np.uint8:
        raise ImageError(f"cannot read image {name}: {image.dtype} pixels; convert it to 8 or 16 bit first")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # OpenCV's own IMREAD_COLOR_RGB garbles 16-bit TIFF


def _decode_with_pil(data: bytes, name: str) -> np.ndarray:
    """For formats that this build of OpenCV lacks, and for the error message of a broken file."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _convert(image, name)
    except _DECODING_ERRORS as error:
        raise _image_error(error, name) from None


def _convert(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in ("F", "I"):
        raise ImageError(f"cannot read image {name}: pixels of mode {image.mode}; convert it to 8 or 16 bit")
    if image.mode.startswith("I;16"):
        return np.repeat(_to_8_bit(np.asarray(image))[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _to_8_bit(image: np.ndarray) -> np.ndarray:
    out = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), 256):  # in strips: uint32 of a whole large image would take gigabytes
        rows = slice(start, start + 256)
        out[rows] = (image[rows].astype(np.uint32) + 128) // 257
    return out


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return image
    turned = Image.fromarray(image)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(turned))


def _read_header(data: bytes, name: str) -> tuple[int, int]:
    """Stored (height, width)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _DECODING_ERRORS as error:
        raise _image_error(error, name) from None


def _has_more_frames(data: bytes, name: str) -> bool:
    """Whether there are several frames; of some formats this reads all of the first one."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.format in _FORMATS_WITH_FRAMES and getattr(image, "is_animated", False)
    except _DECODING_ERRORS as error:
        raise _image_error(error, name) from None


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return exif_orientation(image, data)


def _read_bytes(source: str | Path | bytes) -> bytes:
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise _image_error(error, _name(source)) from None
    if not data:
        raise ImageError(f"cannot read image {_name(source)}: the file is empty")
    return data


def _name(source: str | Path | bytes) -> str:
    return "bytes" if isinstance(source, bytes) else str(source)


def _image_error(error: Exception, name: str) -> ImageError:
    return error if isinstance(error, ImageError) else ImageError(f"cannot read image {name}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_MEGAPIXELS} million pixels: cut it into tiles or make it smaller"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
