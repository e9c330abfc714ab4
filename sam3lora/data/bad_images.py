"""Images that cannot be read: what is known of one, and finding most of them by the two ends of their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image

from sam3lora.data.images import ImageError, check_image

MOST_DECODED = 100
"""Files with an odd end that are decoded: in some sets every file has data behind its image."""

WITHOUT_THEM = (
    "go on without them: training.on_bad_image=skip in a configuration, or --on-bad-image skip of validate and compare"
)
"""Advice that ends a sentence about images."""

_THREADS = 8  # opening a file on a network drive is mostly waiting
_FILES_AT_ONCE = 1000
_END_BYTES = 4096
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # rare or impossible among coded pixels


class SkippedImage(NamedTuple):
    """An image that was left out because it cannot be read."""

    image_id: int
    path: str
    reason: str

    @classmethod
    def of(cls, record: Mapping[str, Any], error: ImageError) -> SkippedImage:
        """The image of a record of an index, and why it was not read."""
        return cls(record["image_id"], record["path"], str(error).removeprefix(f"cannot read image {record['path']}: "))


def find_unreadable(records: Sequence[Mapping[str, Any]]) -> list[SkippedImage]:
    """Images that cannot be read, found without decoding the others: 0.1 ms for each on a local disk.

    A file without the header of an image, or a JPEG or PNG file without its end, is decoded, which decides. Damage
    between the ends is not found, nor are more than `MOST_DECODED` files decoded.

    Args:
        records: Of an index: `image_id`, `path`, `height` and `width` are used.
    """
    odd: list[Mapping[str, Any]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(records), _FILES_AT_ONCE):  # what is submitted takes memory
            some = records[start : start + _FILES_AT_ONCE]
            are_whole = pool.map(_has_both_ends, [record["path"] for record in some])
            odd += [record for record, is_whole in zip(some, are_whole, strict=True) if not is_whole]
    return list(_undecodable(odd[:MOST_DECODED]))


def _has_both_ends(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            with Image.open(file) as image:
                mark = _END_MARKS.get(image.format or "", b"")
            file.seek(max(0, file.seek(0, 2) - _END_BYTES))
            return mark in file.read()
    except Exception:  # damaged files raise errors of many kinds; decoding tells which
        return False


def _undecodable(records: Iterable[Mapping[str, Any]]) -> Iterable[SkippedImage]:
    for record in records:
        try:
            check_image(record["path"], (record["height"], record["width"]))
        except ImageError as error:
            yield SkippedImage.of(record, error)
