"""Values of the pixels of one mask image: reading them, and what they mean in masks of a single category."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledImage
from sam3lora.data.faults import FaultLog
from sam3lora.errors import UserError

VOID = 255
_MAX_STRETCH = 1.05  # between the aspect ratios of mask and image; beyond this the mask belongs to another image


def read_values(mask_file: Path, image: LabelledImage, log: FaultLog, *, colours: bool) -> np.ndarray:
    """Pixel values (H, W) int32 at the size of the image. Palette indices and grey values stay as they are.

    Args:
        colours: Read colours as grey.

    Raises:
        UserError: The mask cannot be read, is in colours without `colours`, or has another shape than its image.
    """
    return _fit(_decode(mask_file, image, log, colours), image, mask_file, log)


def _decode(mask_file: Path, image: LabelledImage, log: FaultLog, colours: bool) -> np.ndarray:
    try:
        with Image.open(mask_file) as picture:
            _check_shape(picture.size, image, mask_file)
            if picture.mode not in ("RGB", "RGBA", "LA", "CMYK"):
                return np.array(picture).astype(np.int32)
            if np.ptp(np.asarray(picture.convert("RGB")), axis=2).any():
                if not colours:
                    raise UserError(f"{mask_file} is a colour image; expected one number a pixel (grey or palette)")
                log.add("colour_mask", str(mask_file))
            return np.array(picture.convert("L")).astype(np.int32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read mask {mask_file}: {error}") from None


def _check_shape(size_wh: tuple[int, int], image: LabelledImage, mask_file: Path) -> None:
    """Refuse a mask of another shape than its image before it is decoded."""
    stretch = (size_wh[0] / size_wh[1]) / (image.size_hw[1] / image.size_hw[0])
    if not 1 / _MAX_STRETCH < stretch < _MAX_STRETCH:
        raise UserError(f"{_sizes(size_wh, image, mask_file)}; a mask must have its image's shape")


def _sizes(size_wh: tuple[int, ...], image: LabelledImage, mask_file: Path) -> str:
    return f"{mask_file}: {size_wh[0]} x {size_wh[1]}, image {image.size_hw[1]} x {image.size_hw[0]}"


def _fit(values_HW: np.ndarray, image: LabelledImage, mask_file: Path, log: FaultLog) -> np.ndarray:
    size_hw = values_HW.shape
    if size_hw == image.size_hw:
        return values_HW
    log.add("mask_resized", _sizes(size_hw[::-1], image, mask_file))
    return cv2.resize(values_HW, image.size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


class OneCategory:
    """The meaning of semantic masks of one category: black and white, or numbers.

    In a set of 0 and 255, or of greys, white is the category. In a set of 0 and 1 the number 1 is. If a mask has 0, 1
    and 255, and none is grey, then 255 is void in the whole set. If some masks have 0 and 1 and others 0 and 255, then
    255 is void if the names begin with the background, which says that values are numbers.
    """

    def __init__(self, names_background: bool) -> None:
        self._names_background = names_background
        self._has_ones = self._has_greys = False
        self._white: list[tuple[LabelledImage, Path]] = []  # with masks of 0 and 255, read as black and white
        self._numbered: list[tuple[LabelledImage, Path]] = []  # with masks of 0, 1 and 255, read as numbers

    def numbers(self, values_HW: np.ndarray, image: LabelledImage, mask_file: Path, log: FaultLog) -> np.ndarray:
        """Values with 1 for the category and 255 for void, as this mask alone tells."""
        found = set(np.unique(values_HW).tolist())
        if max(found) < 128:  # 0 and 1; larger values are refused later
            self._has_ones |= 1 in found
            return values_HW
        if found <= {0, 1, VOID} and 1 in found:
            self._numbered.append((image, mask_file))
            return values_HW
        if found <= {0, VOID}:
            self._white.append((image, mask_file))
        else:
            self._has_greys = True
            log.add("grey_mask", str(mask_file))
        return black_and_white(values_HW)

    def misread(self, log: FaultLog) -> tuple[list[tuple[LabelledImage, Path]], bool]:
        """After a whole set: the images to read again, and whether their values are numbers."""
        if self._numbered and self._has_greys:
            log.add("grey_mask", *(str(path) for _, path in self._numbered), count=len(self._numbered))
            return self._numbered, False
        if self._numbered or (self._has_ones and self._names_background):
            return self._white, True
        if self._has_ones and self._white:
            log.add("mixed_white", *(str(path) for _, path in self._white), count=len(self._white))
        return [], False


def black_and_white(values_HW: np.ndarray) -> np.ndarray:
    return (values_HW >= 128).astype(np.int32)
