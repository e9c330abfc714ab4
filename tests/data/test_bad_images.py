"""Finding images that cannot be read by the two ends of their files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data import bad_images
from sam3lora.data.bad_images import SkippedImage, find_unreadable
from sam3lora.data.images import ImageError, read_image

SIZE_HW = (96, 128)


def encoded(kind: str) -> bytes:
    """An image of noise, which compresses to many bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def records_of(tmp_path) -> Callable[..., list[dict]]:
    def write(**files: bytes) -> list[dict]:
        found = []
        for number, (name, content) in enumerate(files.items()):
            path = tmp_path / f"{name}.jpg"
            path.write_bytes(content)
            found.append({"image_id": number, "path": str(path), "height": SIZE_HW[0], "width": SIZE_HW[1]})
        return found

    return write


def test_no_image_and_images_that_can_be_read(records_of):
    assert find_unreadable([]) == []
    # in any format, and with data of a phone behind the image
    kinds = {kind: encoded(kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")}
    trailing = {f"{kind}_trailing": kinds[kind] + b"more" * 5000 for kind in ("JPEG", "PNG")}
    assert find_unreadable(records_of(**kinds, **trailing)) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_an_image_that_is_cut_short(records_of, kind, share):
    whole = encoded(kind)
    (found,) = find_unreadable(records_of(good=whole, bad=whole[: int(share * len(whole))]))
    assert (found.image_id, Path(found.path).name) == (1, "bad.jpg")
    with pytest.raises(ImageError, match=r"cannot read image .*bad") as error:  # as reading says
        read_image(found.path, SIZE_HW)
    assert str(error.value) == f"cannot read image {found.path}: {found.reason}"


def test_what_is_no_image(records_of, tmp_path):
    records = records_of(empty=b"", text=b"I am a text, " * 500)
    (tmp_path / "folder.jpg").mkdir()
    records += [
        {"image_id": number, "path": str(tmp_path / name), "height": 5, "width": 5}
        for number, name in ((7, "folder.jpg"), (9, "gone.jpg"))
    ]
    found = {image.image_id: image.reason for image in find_unreadable(records)}
    assert found == {
        0: "the file is empty",
        1: "no known image format",
        7: "Is a directory",
        9: "No such file or directory",
    }


def test_only_files_with_an_odd_end_are_decoded_and_only_some_of_these(records_of, monkeypatch):
    decoded = []
    monkeypatch.setattr(bad_images, "check_image", lambda path, size_hw: decoded.append(Path(path).stem))
    whole = encoded("JPEG")
    odd = whole + b"more" * 5000
    records = records_of(a=whole, b=odd, c=whole, d=odd, e=odd)
    find_unreadable(records)
    assert decoded == ["b", "d", "e"]
    decoded.clear()
    monkeypatch.setattr(bad_images, "MOST_DECODED", 2)
    find_unreadable(records)
    assert decoded == ["b", "d"]


def test_the_reason_does_not_name_the_file_again():
    record = {"image_id": 3, "path": "/data/a.jpg", "height": 1, "width": 1}
    error = ImageError("cannot read image /data/a.jpg: the file is empty")
    assert SkippedImage.of(record, error) == (3, "/data/a.jpg", "the file is empty")
