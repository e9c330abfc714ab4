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
from serve_app.http import image_header
from serve_app.http.errors import ServeError
from serve_app.http.image_header import read_header
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


# ---- metadata without end --------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def in_jpeg(*segments: bytes) -> bytes:
    data = picture((20, 30), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_png(*chunks: bytes) -> bytes:
    data = picture((20, 30))
    return data[:33] + b"".join(chunks) + data[33:]


def in_gif(extensions: bytes) -> bytes:
    data = picture((20, 30), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + extensions + data[start:]


def in_ppm(text: bytes) -> bytes:
    return b"P6\n" + text + b"30 20\n255\n" + bytes(1800)


def in_tiff(num_tags: int, num_bytes: int) -> bytes:
    """Tags that nobody knows, each of which refers to the same bytes."""
    known = [(256, 3, 1, 30), (257, 3, 1, 20), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    known += [(277, 3, 1, 1), (278, 3, 1, 20), (279, 4, 1, 600)]
    tags = known + [(1000 + number, 7, num_bytes, 8) for number in range(num_tags)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    pixels = bytes(max(600, num_tags * num_bytes))  # Pillow skips tags that refer to more than the file
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def exif(num_tags: int) -> bytes:
    tags = b"".join(struct.pack("<HHII", 1000 + number, 4, 1, 8) for number in range(num_tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, num_tags) + tags + bytes(4)


MEGABYTE = zlib.compress(bytes(1_000_000))
ENDLESS = {
    "PPM: a comment": in_ppm(b"#" + b"x" * 100_000 + b"\n"),
    "PPM: comments": in_ppm(b"#\n" * 50_000),
    "PPM: blanks": in_ppm(b" " * 100_000),
    "JPEG: EXIF data": in_jpeg(*[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 80),
    "JPEG: small segments": in_jpeg(*[segment(0xE9, b"")] * 5000),
    "JPEG: resources of Photoshop": in_jpeg(*[segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 15_000)] * 80),
    "JPEG: fill bytes": in_jpeg(b"\xff" * 100_000),
    "JPEG: frame headers": in_jpeg(*[segment(0xC0, struct.pack(">BHHB", 8, 20, 30, 1) + b"\1\x11\0")] * 5000),
    "PNG: private chunks": in_png(*[chunk(b"prVt", b"")] * 5000),
    "PNG: a text": in_png(chunk(b"tEXt", b"k\0" + b"t" * 5_000_000)),
    "PNG: compressed profiles": in_png(*[chunk(b"iCCP", b"k\0\0" + MEGABYTE)] * 100),
    "PNG: compressed texts": in_png(*[chunk(b"zTXt", b"k\0\0" + MEGABYTE)] * 40),
    "GIF: a comment": in_gif(b"\x21\xfe" + b"\1c" * 50_000 + b"\0"),
    "GIF: comments": in_gif(b"\x21\xfe\1c\0" * 20_000),
    "GIF: unknown blocks": in_gif(bytes(100_000)),
    "TIFF: tags": in_tiff(5000, 4),
    "TIFF: one tag of much data": in_tiff(1, 8_000_000),
}
MUCH_BUT_FINE = {
    "PPM: a comment": in_ppm(b"# CREATOR: " + b"x" * 500 + b"\n"),
    "JPEG: a profile of a megabyte": in_jpeg(*[segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000))] * 17),
    "JPEG: a preview in XMP": in_jpeg(*[segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))] * 50),
    "JPEG: EXIF data with many tags": in_jpeg(segment(0xE1, exif(300))),
    "PNG: a compressed profile, texts": in_png(chunk(b"iCCP", b"k\0\0" + MEGABYTE), *[chunk(b"zTXt", b"k\0\0x")] * 9),
    "GIF: a comment": in_gif(b"\x21\xfe" + (b"\xff" + b"c" * 255) * 40 + b"\0"),
    "TIFF: tags": in_tiff(200, 400),
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of each read."""
    seen: list[int] = []

    class CountingFile(image_header.HeaderFile):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            seen.append(len(data))
            return data

    monkeypatch.setattr(image_header, "HeaderFile", CountingFile)
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("data", ENDLESS.values(), ids=ENDLESS)
def test_a_header_without_end_is_refused_after_few_reads(
    reads: list[int], monkeypatch: pytest.MonkeyPatch, data: bytes
):
    inflated: list[int] = []
    inflate = PngImagePlugin._safe_zlib_decompress
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda data: inflated.append(1) or inflate(data))
    with pytest.raises(ServeError) as caught:
        header(data)
    assert (caught.value.type, "too much metadata" in caught.value.message) == ("invalid_image", True)
    assert len(reads) <= image_header.MAX_READS
    assert sum(reads) <= image_header.MAX_READ_BYTES
    assert len(inflated) <= image_header.MAX_COMPRESSED_CHUNKS


@pytest.mark.parametrize("data", MUCH_BUT_FINE.values(), ids=MUCH_BUT_FINE)
def test_much_metadata_is_accepted(reads: list[int], data: bytes):
    assert header(data).size_hw == (20, 30)
    assert 0 < len(reads) < image_header.MAX_READS / 2


def test_an_orientation_among_many_tags_costs_no_other_tag(monkeypatch: pytest.MonkeyPatch):
    data = picture((20, 30))
    tags = exif(5000)[6:-4]
    turned = tags[:8] + struct.pack("<H", 5001) + tags[10:] + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("all tags are read"))
    assert header(data[:33] + chunk(b"eXIf", turned) + data[33:]).size_hw == (30, 20)
