"""Reading the images of records on a worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3lora.config.training import OnBadImage
from sam3lora.data.bad_images import WITHOUT_THEM, SkippedImage
from sam3lora.data.images import ImageError, read_annotated_image


class ReadImages(NamedTuple):
    """The records whose images could be read, these images, and the others."""

    records: list[Mapping[str, Any]]
    images: list[Any]
    skipped: list[SkippedImage]


class Asked(NamedTuple):
    """What a worker answers for the images of a batch that it could read, and the others."""

    answers: Any
    skipped: list[SkippedImage]


def read_images(
    records: Sequence[Mapping[str, Any]],
    on_bad_image: OnBadImage,
    prepare: Callable[[Mapping[str, Any], np.ndarray], Any] = lambda record, pixels_HW3: pixels_HW3,
) -> ReadImages:
    """The records' images, at the size that the annotations refer to.

    Args:
        prepare: What becomes of a record and its pixels, uint8 (H, W, 3), before the next image is read.

    Raises:
        ImageError: One cannot be read and `on_bad_image` is "stop", or its folder is gone: then nothing is wrong with
            the image, and all that follow would be missing too.
    """
    read = ReadImages([], [], [])
    for record in records:
        try:
            pixels_HW3 = read_annotated_image(record)
        except ImageError as error:
            folder = os.path.dirname(record["path"])
            if not _has_files(folder):
                raise ImageError(
                    f"{error}. The folder {folder} is gone or empty: bring it back, then measure again"
                ) from None
            if on_bad_image == "stop":
                raise ImageError(f"{error}. Repair such images, take them out of the file, or {WITHOUT_THEM}") from None
            read.skipped.append(SkippedImage.of(record, error))
        else:
            read.images.append(prepare(record, pixels_HW3))
            read.records.append(record)
    return read


def _has_files(folder: str) -> bool:
    """Whether a folder can be listed and has an entry: a drive that went away may leave an empty one."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False
