"""`sam3lora infer` with a dense folder: labels for the pixels of an image, or of a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.cli.infer_output import (
    check_output_of_images,
    check_writable,
    print_table,
    run_with_progress,
    table_of,
)
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.inference.image_folder import FolderResults


def infer_dense(
    image: Path, output: Path, json: Path | None, settings: Mapping[str, Any], *, probabilities: bool
) -> None:
    """Label an image, or each of a folder, into the folder `output`; see `DenseFiles`.

    Args:
        json: None is results.json in `output`.
        settings: Arguments of `Predictor`.
    """
    from sam3lora.data.images import read_size
    from sam3lora.inference.dense.files import LABELS, DenseFiles
    from sam3lora.inference.dense.predictor import settings_of
    from sam3lora.inference.image_folder import ask_each, list_images
    from sam3lora.inference.predictor import Predictor

    json = json or output / "results.json"
    check_output_of_images(output, image)
    if image.is_dir():
        paths = list_images(image)
    else:
        read_size(image)  # no image: said before the model is loaded
        paths = [image]
    for path in (output / LABELS / paths[0].name, json):
        check_writable(path)
    chosen = settings_of(settings["adapter"], {"threshold": settings.get("threshold")})
    files = DenseFiles(output, chosen, probabilities=probabilities)
    predictor = Predictor(**settings)

    def ask(path: Path, name: str) -> tuple[tuple[int, int], dict[str, Any]]:
        result = predictor.predict_dense(path)
        return result.size_hw, files.write(name, result)

    def run(on_done: Callable[[], None]) -> FolderResults:
        return ask_each(paths, ask, predictor.settings, json_path=json, on_done=on_done)

    run_with_progress(
        len(paths), run, source=image, written=f"labels and pictures: {output}; areas", json=json, tell=_print_table
    )


def refuse_prompted(given: Mapping[str, Any], adapter: Path) -> None:
    """Raise UserError for an option of prompts or objects that was given; None, False and [] were not."""
    for option, value in given.items():
        if value is not None and value is not False and value != []:
            raise UserError(f"{option} has no effect with {adapter}, which labels each pixel: leave it out")


def _print_table(results: FolderResults) -> None:
    from rich.text import Text

    table = table_of(results.settings, "class", "share of pixels", "in images")
    entries = [image["classes"] for image in results.images]
    num_pixels = sum(image["width"] * image["height"] for image in results.images)
    for number, name in enumerate(results.settings["classes"]):
        areas = [of_image[number]["area_px"] for of_image in entries]
        share = f"{100 * sum(areas) / num_pixels:.2f} %" if num_pixels else "-"
        table.add_row(Text(name), share, f"{sum(area > 0 for area in areas)} of {len(areas)}")
    print_table(table)
