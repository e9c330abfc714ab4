"""All images of a folder in one process: pictures of each, and one JSON file.

For tens of thousands of images or several GPUs use the batch job (`inference.batch`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.data.images import IMAGE_SUFFIXES, ImageError
from sam3lora.engine.detections import Detections
from sam3lora.errors import UserError
from sam3lora.files import write_whole
from sam3lora.inference.predictor import Predictor


@dataclass
class FolderResults:
    """The JSON file of some images' results.

    Attributes:
        settings: `Predictor.settings`, and the prompts if there are any.
        images: For each image `file_name`, `width`, `height` and what was found: `results`, see `Detections.to_dict`,
            or what `DenseFiles.write` returns.
        skipped: For each image that could not be read `file_name` and `reason`.
        interrupted: Whether Ctrl-C stopped it before the last image.
    """

    settings: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False

    def add(self, file_name: str, size_hw: tuple[int, int], found: Mapping[str, Any]) -> None:
        height, width = size_hw
        self.images.append({"file_name": file_name, "width": width, "height": height, **found})

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


def result_names(paths: Sequence[Path]) -> list[str]:
    """A name without a suffix for the results of each image: `a` for `a.tif`, or `a.tif` if there is another `a`.

    >>> result_names([Path("a.tif"), Path("b.jpg"), Path("b.png")])
    ['a', 'b.jpg', 'b.png']
    """
    stems = Counter(path.stem.casefold() for path in paths)
    return [path.stem if stems[path.stem.casefold()] == 1 else path.name for path in paths]


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
) -> FolderResults:
    """Ask every image for the prompts, draw the detections, and write them all to one JSON file; see `ask_each`.

    Without `show_masks` the file has no masks either.

    Raises:
        UserError: An empty or too long prompt, or a file that cannot be written.
    """

    def ask(path: Path, name: str) -> tuple[tuple[int, int], dict[str, Any]]:
        results = predictor.predict(path, prompts, masks=show_masks)
        predictor.draw(results, pictures_dir / f"{name}.jpg", show_boxes=show_boxes, show_masks=show_masks)
        return results[0].size_hw, detections_of(results)

    settings = {**predictor.settings, "prompts": list(prompts)}
    return ask_each(paths, ask, settings, json_path=json_path, on_done=on_done)


def detections_of(results: Sequence[Detections]) -> dict[str, Any]:
    """What the JSON file holds of the prompts of an image."""
    return {"results": [result.to_dict() for result in results]}


def ask_each(
    paths: Sequence[Path],
    ask: Callable[[Path, str], tuple[tuple[int, int], Mapping[str, Any]]],
    settings: dict[str, Any],
    *,
    json_path: Path,
    on_done: Callable[[], None] = lambda: None,
) -> FolderResults:
    """The results of images, one after the other, and their JSON file.

    An image that cannot be read is listed as skipped. If anything stops the run, the JSON file still holds the images
    done so far; Ctrl-C ends the run normally.

    Args:
        ask: Gets an image and the name of its results, writes its pictures, and returns its size (height, width) and
            what the file holds of it.
        on_done: Called after each image.

    Raises:
        UserError: The file cannot be written, or `ask` raises it.
    """
    results = FolderResults(settings)
    try:
        for path, name in zip(paths, result_names(paths), strict=True):
            try:
                results.add(path.name, *ask(path, name))
            except ImageError as error:
                results.skipped.append({"file_name": path.name, "reason": str(error)})
            on_done()
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        if results.images or results.skipped:
            results.write(json_path)
    return results
