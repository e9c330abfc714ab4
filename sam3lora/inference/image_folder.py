"""Prompts on all images of a folder in one process: a picture of each, and one JSON file.

For tens of thousands of images or several GPUs use the batch job (`inference.batch`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.data.images import IMAGE_SUFFIXES, ImageError
from sam3lora.engine.detections import Detections
from sam3lora.errors import UserError
from sam3lora.files import write_whole
from sam3lora.inference.predictor import Predictor


@dataclass
class FolderDetections:
    """The JSON file of some images' detections.

    Attributes:
        settings: `Predictor.settings` and the prompts.
        images: For each image `file_name`, `width`, `height` and `results`, see `Detections.to_dict`.
        skipped: For each image that could not be read `file_name` and `reason`.
        interrupted: Whether Ctrl-C stopped it before the last image.
    """

    settings: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False

    def add(self, file_name: str, results: Sequence[Detections]) -> None:
        height, width = results[0].size_hw
        found = [result.to_dict() for result in results]
        self.images.append({"file_name": file_name, "width": width, "height": height, "results": found})

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all.

        Raises:
            UserError: It cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(vars(self), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder by name, told by their endings; hidden files and sub-folders are left out.

    Raises:
        UserError: There are none.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror or error}") from None
    visible = [path for path in entries if not path.name.startswith(".")]
    images = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not images:
        inner = [path.name for path in visible if path.is_dir()]
        note = f"; its sub-folders are not searched: {', '.join(inner[:3])}" if inner else ""
        raise UserError(f"no images in {folder}: expected files such as .jpg or .png{note}")
    return images


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for the picture of each image: `a.jpg` for `a.tif`, or `a.tif.jpg` if there is another `a`.

    >>> picture_names([Path("a.tif"), Path("b.jpg"), Path("b.png")])
    ['a.jpg', 'b.jpg.jpg', 'b.png.jpg']
    """
    stems = Counter(path.stem.casefold() for path in paths)
    return [f"{path.stem if stems[path.stem.casefold()] == 1 else path.name}.jpg" for path in paths]


def predict_folder(
    predictor: Predictor,
    paths: Sequence[Path],
    prompts: Sequence[str],
    *,
    pictures_dir: Path,
    json_path: Path,
    show_boxes: bool = False,
    show_masks: bool = True,
    on_done: Callable[[], None] = lambda: None,
) -> FolderDetections:
    """Ask every image for the prompts, draw the detections, and write them all to one JSON file.

    An image that cannot be read is listed as skipped. If anything stops the run, the JSON file still holds the images
    done so far; Ctrl-C ends the run normally. Without `show_masks` the file has no masks either. `on_done` is called
    after each image.

    Raises:
        UserError: An empty or too long prompt, or a file that cannot be written.
    """
    predictions = FolderDetections({**predictor.settings, "prompts": list(prompts)})
    try:
        for path, picture in zip(paths, picture_names(paths), strict=True):
            try:
                results = predictor.predict(path, prompts, masks=show_masks)
            except ImageError as error:
                predictions.skipped.append({"file_name": path.name, "reason": str(error)})
            else:
                predictor.draw(results, pictures_dir / picture, show_boxes=show_boxes, show_masks=show_masks)
                predictions.add(path.name, results)
            on_done()
    except KeyboardInterrupt:
        predictions.interrupted = True
    finally:
        if predictions.images or predictions.skipped:
            predictions.write(json_path)
    return predictions
