"""Reading all kinds of images, and resizing as the model's own processor does."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sam3lora.data.images import ImageError, check_image, read_first_frame, read_image, read_size, resize_image

RAMP = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 240, 8)), axis=-1).astype(np.uint8)
RGB = np.concatenate([RAMP, 255 - RAMP[..., :1]], axis=-1)  # (30, 40, 3)
CUTS = (0.1, 0.5, 0.9, 0.99)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")],
)
def test_modes_and_formats_agree_with_pil(mode, kind):
    data = encode(Image.fromarray(RGB).convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    image = read_image(data)
    assert (image.dtype, image.shape) == (np.uint8, (30, 40, 3))
    assert np.abs(image - expected).max() <= 1


def test_alpha_is_dropped():
    # fully transparent pixels keep their colour
    alpha = np.zeros((30, 40, 1), dtype=np.uint8)
    assert np.array_equal(read_image(encode(Image.fromarray(np.concatenate([RGB, alpha], 2)), "PNG")), RGB)


def test_sixteen_bit_values_are_scaled_over_their_range():
    grey = encode(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), "PNG")
    assert np.array_equal(read_image(grey), np.repeat(RGB[..., :1], 3, axis=2))
    colour = cv2.imencode(".tiff", RGB[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(read_image(colour), RGB)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    (tmp_path / "photo.png").write_bytes(encode(Image.fromarray(RGB), "JPEG"))
    assert read_image(tmp_path / "photo.png").shape == (30, 40, 3)
    assert read_size(tmp_path / "photo.png") == (30, 40)


def test_orientation_is_ignored_unless_the_annotations_use_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(read_image(data), RGB)
    assert np.array_equal(read_image(data, expected_size_hw=(30, 40)), RGB)
    # orientation 6: turned a quarter clockwise
    assert np.array_equal(read_image(data, expected_size_hw=(40, 30)), np.rot90(RGB, -1))
    assert np.array_equal(read_image(data, orientation="exif"), np.rot90(RGB, -1))
    # a size that is wrong in another way, and a transposed size without the tag
    assert np.array_equal(read_image(data, expected_size_hw=(20, 30)), RGB)
    assert np.array_equal(read_image(encode(Image.fromarray(RGB), "PNG"), expected_size_hw=(40, 30)), RGB)


@pytest.mark.parametrize(("kind", "num_frames"), [("PNG", 1), ("GIF", 1), ("GIF", 3), ("TIFF", 2)])
def test_first_frame_and_whether_there_are_more(kind, num_frames, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    frames = [Image.fromarray(np.roll(RGB, 5 * number, axis=0)) for number in range(num_frames)]
    path = tmp_path / "image"
    path.write_bytes(encode(frames[0], kind, save_all=True, append_images=frames[1:], exif=exif))
    expected = read_image(path, orientation="exif")
    reads = []
    original = type(path).read_bytes
    monkeypatch.setattr(type(path), "read_bytes", lambda self: reads.append(1) or original(self))
    pixels, has_more = read_first_frame(path)
    assert (has_more, len(reads)) == (num_frames > 1, 1)
    assert np.array_equal(pixels, expected)
    with pytest.raises(ImageError, match="40 x 30 pixels"):
        read_first_frame(path, max_megapixels=0.001)


def test_unreadable_images_name_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    jpeg, png = (encode(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    floats = encode(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    # cut off in the middle, not an image, empty, floating point
    for name, data in {"a.jpg": jpeg[:9000], "b.png": png[:9000], "c.jpg": b"text", "d": b"", "e.tif": floats}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="image bytes"):
        read_image(b"text")


def test_damage_of_which_pillow_raises_a_runtime_error(tmp_path):
    avif = encode(Image.fromarray(RGB), "AVIF").replace(b"iloc", b"free")  # does not say where the image begins
    dds = encode(Image.fromarray(RGB), "DDS")
    dds = dds[:80] + bytes(4) + dds[84:]  # no kind of pixels
    for number, data in enumerate((avif, dds)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data)
        for read in (read_image, check_image, read_first_frame, read_size):
            with pytest.raises(ImageError, match=rf"cannot read image .*{number}\.jpg: "):
                read(path)


def test_resize_agrees_with_the_models_processor_on_photographs(shared_data):
    processor_module = pytest.importorskip("transformers.models.sam3.image_processing_sam3")
    paths = [sorted((shared_data / name / "valid").glob("*.jpg"))[1] for name in ("facade", "strawberry", "mushrooms")]
    for path in paths:
        image = read_image(path)
        # decoding is PIL's
        assert np.abs(image - np.asarray(Image.open(path).convert("RGB")).astype(int)).mean() < 1
        image = image[:300, :400]
        for scale in (0.3, 0.5, 0.75, 1.0, 1.575, 3.0):
            # also with one side enlarged and the other shrunk
            for ratio in (1.0, 1.5):
                size = (round(image.shape[0] * scale / ratio), round(image.shape[1] * scale))
                processor = processor_module.Sam3ImageProcessor(
                    size={"height": size[0], "width": size[1]}, do_rescale=False, do_normalize=False
                )
                expected = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
                resized = resize_image(image, size)
                assert resized.dtype == np.uint8
                assert np.abs(resized - expected.astype(float)).mean() < 0.3, (path.name, scale, ratio)


def test_checking_an_image_finds_what_reading_it_finds(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)
    noise = np.ascontiguousarray(cv2.resize(noise[:9, :20], (200, 90)))
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    picture = Image.fromarray(noise)
    whole = {
        "plain": encode(picture, "JPEG"),
        "progressive": encode(picture, "JPEG", progressive=True),
        "grey": encode(picture.convert("L"), "JPEG"),
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "turned": encode(picture, "JPEG", exif=turned),
        "tiny": encode(picture.resize((3, 2)), "JPEG"),
        "png": encode(picture, "PNG"),
        "floats": encode(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"),
        "text": b"\xff\xd8 is how a JPEG begins",
        "empty": b"",
    }
    cut = {f"{name} cut to {share}": data[: int(len(data) * share)] for name, data in whole.items() for share in CUTS}
    damaged = {f"{name} damaged": data[:300] + bytes(60) + data[360:] for name, data in whole.items()}

    def found(look, data, expected):
        try:
            return look(data, expected)
        except ImageError as error:
            return str(error)

    num_errors = 0
    for name, data in (whole | cut | damaged).items():
        for expected in (None, (90, 200), (200, 90), (7, 7)):
            size = found(lambda *arguments: read_image(*arguments).shape[:2], data, expected)
            assert found(check_image, data, expected) == size, (name, expected)
            num_errors += isinstance(size, str)
    assert num_errors > 4 * len(cut) * 0.9
    assert check_image(whole["turned"], (200, 90)) == (200, 90)
    assert check_image(whole["turned"], (90, 200)) == (90, 200)
    assert check_image(whole["plain"], (200, 90)) == (90, 200)
    (tmp_path / "cut.jpg").write_bytes(cut["plain cut to 0.5"])
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        check_image(tmp_path / "cut.jpg")
