"""Format and size from headers: they agree with what decoding gives, and nothing is decoded to find them."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sam3lora.data.images import read_image
from serve_app.http.errors import ServeError
from serve_app.http.requests import read_header
from serve_app.settings import IMAGE_FORMATS

from .http_cases import picture


def header(data: bytes, formats=IMAGE_FORMATS, max_megapixels: float = 50.0):
    return read_header(data, formats=formats, max_megapixels=max_megapixels)


def with_orientation(format: str, orientation: int) -> bytes:
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_accepted_format_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch, format: str):
    data = picture((20, 30), format)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert header(data) == (format, (20, 30))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_image(format: str, orientation: int):
    data = with_orientation(format, orientation)
    assert header(data).size_hw == read_image(data, orientation="exif").shape[:2]


def test_orientation_behind_the_pixels_of_a_png():
    """The eXIf chunk may stand behind the image data."""
    data = with_orientation("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    iend = data.index(b"IEND") - 4
    moved = data[:start] + data[end:iend] + data[start:end] + data[iend:]
    assert header(moved).size_hw == read_image(moved, orientation="exif").shape[:2] == (30, 20)


@pytest.mark.parametrize("place", ["text", "behind the pixels", "behind the end"])
def test_a_png_that_mentions_exif_is_not_decoded(monkeypatch: pytest.MonkeyPatch, place: str):
    data = picture((20, 30))
    text = b"a\0eXIf and Raw profile type"
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    at = {"text": 33, "behind the pixels": data.index(b"IEND") - 4, "behind the end": len(data)}[place]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert header(data[:at] + chunk + data[at:]) == ("PNG", (20, 30))
    turned = with_orientation("PNG", 6)
    assert header(turned) == ("PNG", (30, 20))


def test_exif_data_that_an_old_imagemagick_wrote():
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n 38\n{exif.tobytes().hex()}\n", zip=True)
    data = picture((20, 30), pnginfo=info)
    assert header(data).size_hw == read_image(data, orientation="exif").shape[:2] == (30, 20)


def test_too_many_pixels_are_refused_before_the_orientation_is_read():
    """Looking for it may decode."""
    data = with_orientation("PNG", 6)
    with pytest.raises(ServeError) as caught:
        header(data, max_megapixels=599e-6)
    assert caught.value.type == "image_too_large"
    assert header(data, max_megapixels=600e-6).size_hw == (30, 20)


def test_only_named_formats_are_opened():
    with pytest.raises(ServeError) as caught:
        header(picture((4, 4), "GIF"), formats=("JPEG", "PNG"))
    assert caught.value.type == "unsupported_image"
    assert caught.value.message == "the image is GIF; expected JPEG, PNG: convert it first"


def test_a_phones_jpeg_with_a_preview_is_a_jpeg():
    file = io.BytesIO()
    frames = [Image.new("RGB", (30, 20)), Image.new("RGB", (6, 4))]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    assert header(file.getvalue()) == ("JPEG", (20, 30))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_damaged_header_is_read_or_refused(format: str):
    """Whatever the bytes, the answer is a header or a `ServeError`."""
    data = picture((8, 8), format)
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data[: rng.integers(1, len(data))])
        for place in rng.integers(0, min(len(broken), 64), 3):
            broken[place] = rng.integers(256)
        with contextlib.suppress(ServeError):
            assert min(header(bytes(broken)).size_hw) > 0
