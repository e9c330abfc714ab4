"""Predicted label maps as PNG files, one for each image of a split.

    predictions/IMAGE.png           values of the classes, 0 is the background, with a palette
    predictions/CLASS/IMAGE.png     255 where the class is, else 0, where classes may overlap
    probabilities/IMAGE.png         mode binary: 255 x probability of the foreground, rounded down

Shapes: `M` label maps of an image, `H` `W` pixels.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from sam3lora.data.label_palette import palette_image
from sam3lora.inference.dense.files import class_folders
from sam3lora.model.dense.settings import DenseSettings

LABELS, PROBABILITIES = "predictions", "probabilities"


class ImageMaps(NamedTuple):
    """The maps of an image as PNG: label maps, and in mode binary the probability."""

    labels: list[bytes]
    probability: bytes | None

    @classmethod
    def of(cls, labels_MHW: np.ndarray, probability_HW: np.ndarray | None) -> ImageMaps:
        """From uint8 label maps, one or one for each class, and a probability in [0, 1]."""
        grey = None if probability_HW is None else _grey_png((probability_HW * 255).astype(np.uint8))
        return cls([_palette_png(one) if len(labels_MHW) == 1 else _grey_png(one * 255) for one in labels_MHW], grey)


@dataclass(frozen=True)
class MapFolder:
    """The maps of a split in a folder.

    Attributes:
        root: Folder that holds `predictions` and `probabilities`.
        names: Image id -> its file's name, from `png_names`.
    """

    root: Path
    names: Mapping[int, str]
    model: DenseSettings

    def write(self, image_id: int, maps: ImageMaps) -> None:
        for place, png in zip(self._places(image_id), maps.labels, strict=True):
            _write(place, png)
        if maps.probability is not None:
            _write(self.root / PROBABILITIES / self.names[image_id], maps.probability)

    def labels(self, image_id: int) -> np.ndarray:
        """uint8 (M, H, W) of an image."""
        values_MHW = np.stack([np.array(Image.open(place)) for place in self._places(image_id)])
        return values_MHW // 255 if len(values_MHW) > 1 else values_MHW

    def _places(self, image_id: int) -> list[Path]:
        folder, name = self.root / LABELS, self.names[image_id]
        if self.model.mode != "multilabel":
            return [folder / name]
        return [folder / own / name for _, own in class_folders(self.model.classes)]


def png_names(file_names: Sequence[str]) -> list[str]:
    """Names of PNG files for images, in their subfolders: unlike each other, and inside of the folder that holds them.

    >>> png_names(["a.jpg", "b/a.jpg", "../c.png", "d.jpg", "d.png"])
    ['a.png', 'b/a.png', 'c.png', 'd.jpg.png', 'd.png.png']
    """
    paths = [PurePosixPath(*[part for part in _path(name).parts if part != ".."]) for name in file_names]
    counts = Counter(path.with_suffix("") for path in paths)
    names = [f"{path if counts[path.with_suffix('')] > 1 else path.with_suffix('')}.png" for path in paths]
    taken: set[str] = set()
    for number, name in enumerate(names):
        while name in taken:
            name = f"{name.removesuffix('.png')}_.png"
        taken.add(name)
        names[number] = name
    return names


def _path(file_name: str) -> PurePosixPath:
    path = PurePosixPath(file_name.replace("\\", "/"))
    return path.relative_to(path.anchor)


def _write(place: Path, png: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(png)


def _palette_png(labels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    palette_image(labels_HW).save(file, format="PNG")
    return file.getvalue()


def _grey_png(values_HW: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", values_HW)
    assert done
    return data.tobytes()
