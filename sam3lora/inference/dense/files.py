"""The files of dense results, in one layout for an image, a folder and a batch run.

labels/NAME.png                 value = class, with a palette; classes.txt beside it names the values from 1
labels/CLASS/NAME.png           where classes may overlap: 255 where the class is, else 0
overlays/NAME.jpg               the image in the colours of its classes
probabilities/CLASS/NAME.png    probability x 255, if wanted
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3lora.data.convert.mask_images import NAMES_FILE
from sam3lora.data.label_palette import palette_image
from sam3lora.errors import UserError
from sam3lora.files import file_name_of, write_whole
from sam3lora.inference.dense.result import DenseResult
from sam3lora.inference.drawing import encode_image
from sam3lora.model.dense.settings import DenseSettings

LABELS, OVERLAYS, PROBABILITIES = "labels", "overlays", "probabilities"


class DenseFiles:
    """Writes results into a folder, each file whole or not at all."""

    def __init__(
        self, folder: Path, settings: DenseSettings, *, overlays: bool = True, probabilities: bool = False
    ) -> None:
        self.folder, self.overlays, self.probabilities = folder, overlays, probabilities
        self._folder_of = dict(class_folders(settings.classes))

    def write(self, name: str, result: DenseResult) -> dict[str, Any]:
        """Write the files of an image.

        Args:
            name: Of the image in the folder, without a suffix; it may have sub-folders.

        Returns:
            `DenseResult.to_dict`, with the path of each file in the folder beside what it shows.

        Raises:
            UserError: A file cannot be written.
        """
        found = result.to_dict()
        if result.label_HW is not None:
            found["label_png"] = self._write(f"{LABELS}/{name}.png", encode_png(palette_image(result.label_HW)))
            if not (self.folder / LABELS / NAMES_FILE).exists():
                names = "".join(f"{each}\n" for each in result.settings.foreground)
                self._write(f"{LABELS}/{NAMES_FILE}", names.encode())
        for entry in found["classes"]:
            of_class = self._folder_of[entry["name"]]
            if result.label_HW is None:
                grey_HW = result.mask(entry["name"]).astype(np.uint8) * 255
                entry["mask_png"] = self._write(f"{LABELS}/{of_class}/{name}.png", encode_png(Image.fromarray(grey_HW)))
            if self.probabilities:
                grey_HW = np.rint(result.probability(entry["name"]) * 255).astype(np.uint8)
                path = f"{PROBABILITIES}/{of_class}/{name}.png"
                entry["probability_png"] = self._write(path, encode_png(Image.fromarray(grey_HW)))
        if self.overlays:
            found["overlay"] = self._write(f"{OVERLAYS}/{name}.jpg", encode_image(result.draw()))
        return found

    def _write(self, name: str, content: bytes) -> str:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        return name


def class_folders(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """A folder for each class, named as it where a file system allows."""
    taken: set[str] = set()
    for number, name in enumerate(names):
        folder = file_name_of(name, "class")
        folder = folder if folder.casefold() not in taken else f"{folder}_{number}"
        taken.add(folder.casefold())
        yield name, folder


def encode_png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
