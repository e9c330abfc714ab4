"""Images as they come: broken, huge, of other colours, turned, animated."""

from __future__ import annotations

import io
import logging
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sam3lora import Predictor
from sam3lora.data.images import ImageError, read_first_frame, read_image

RAMP = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 240, 8)), axis=-1).astype(np.uint8)
RGB = np.concatenate([RAMP, 255 - RAMP[..., :1]], axis=-1)  # (30, 40, 3)
NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this many pixels and has almost none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.fixture(scope="module")
def predictor(small_base) -> Predictor:
    return Predictor(str(small_base), device="cpu")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"dear diary", "no known image format"),
        (encode(NOISE, "JPEG")[:9000], "truncated"),
        (encode(NOISE, "PNG")[:9000], "truncated"),
        (encode(NOISE, "JPEG")[:40], ""),
        (png_header(60_000, 60_000), "more than 178 million pixels"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "8 or 16 bit"),
        (None, "No such file"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "header only", "huge", "floating point", "missing"],
)
def test_unreadable_images_are_named(data, message, predictor, tmp_path):
    # each kind gives one error that names the file and says what is wrong
    path = tmp_path / "photo.jpg"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"^cannot read image .*photo\.jpg: .*{message}") as caught:
        predictor.predict(path, "crack")
    assert "\n" not in str(caught.value)


def test_size_is_refused_before_decoding(monkeypatch):
    # a few bytes can promise gigabytes: nothing may be decoded to find out
    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr("sam3lora.data.images._decode", decode)
    started = time.perf_counter()
    with pytest.raises(ImageError, match="more than 178 million"):
        read_image(png_header(60_000, 60_000))
    with pytest.raises(ImageError, match="9000 x 8000 pixels, expected at most 50 million"):
        read_image(png_header(9_000, 8_000), max_megapixels=50)
    assert time.perf_counter() - started < 5


def test_limit_is_the_callers():
    data = encode(RGB, "PNG")  # 1200 pixels
    assert read_image(data, max_megapixels=0.0012).shape == RGB.shape
    with pytest.raises(ImageError, match="40 x 30 pixels"):
        read_image(data, max_megapixels=0.0011)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_orientation(kind, orientation, quarter_turns):
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(RGB, kind, exif=exif(orientation), **options)
    seen, expected = read_image(data, orientation="exif"), np.rot90(RGB, quarter_turns)
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(int) - expected).mean() < 4
    # annotations refer to the stored pixels (a TIFF has no others than the turned ones)
    stored = read_image(data)
    assert stored.shape[:2] == (expected.shape[:2] if kind == "TIFF" else (30, 40))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_that_does_not_exist_is_none(value):
    assert np.array_equal(read_image(encode(RGB, "PNG", exif=exif(value)), orientation="exif"), RGB)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_of_several_frames(kind, predictor, caplog, tmp_path):
    # one frame is asked, and it is said that there are more
    frames = [Image.fromarray(np.roll(RGB, 5 * number, axis=0)) for number in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "moving"
    path.write_bytes(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    first = np.asarray(Image.open(path).convert("RGB"))
    with caplog.at_level(logging.WARNING):
        (result,) = predictor.predict(path, "crack")
    assert np.array_equal(result.image_HW3, first)
    assert f"{path} holds several frames" in caplog.text


def test_single_frames_are_passed_in_silence(predictor, caplog):
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "JPEG"):
        assert not read_first_frame(encode(RGB, kind))[1]
        predictor.predict(encode(RGB, kind), "crack")
    assert caplog.text == ""


def test_previews_in_a_photograph_are_no_frames():
    # phones keep previews and depth maps in a JPEG; Pillow calls that MPO
    data = encode(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB[::2, ::2])])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert not read_first_frame(data)[1]
