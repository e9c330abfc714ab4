"""What `sam3lora demo --task dense` does of its own: measuring, and what it says to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from sam3lora.config import Config


def measure(config: Config, best: Path, folder: Path) -> Path:
    """Measure a dense folder on the validation images of its run; returns the report."""
    typer.echo("3/3 measuring the labels of pixels")
    from sam3lora.cli.dense_evaluation import DenseMeasurement, validate_dense
    from sam3lora.data.split_files import required_split
    from sam3lora.evaluation.dense.settings import DenseEvaluation

    data = config.data
    split = required_split(config.training.required_data_dir(), data.valid_split, data.annotation_file)
    device = "cuda" if config.scaling.use_gpu is True else "cpu"
    validate_dense(str(best), folder, DenseMeasurement(split, DenseEvaluation(), {"device": device}))
    return folder / "report.html"


def next_steps(folder: str | Path = "outputs/demo") -> list[tuple[str, str]]:
    """Commands and what they do; the first ones use the dense folder of a demo in this folder."""
    best, data = (shlex.quote(str(Path(folder) / name)) for name in ("run/best", "data"))
    return [
        (
            f"sam3lora infer --weights {best} --image {data}/valid --output outputs/labels",
            "label the pixels of a folder of images: label maps, overlays, and JSON with areas",
        ),
        (f"sam3lora validate --weights {best} --val-data-dir {data}", "measure again, on these or other images"),
        ("sam3lora data check DIR --task dense", "count the pixels of your own COCO data set by class"),
        ("sam3lora data convert SRC DIR --from masks --names crack", "make a COCO data set of images and mask PNGs"),
        ("sam3lora train dense_quick_test --data-dir DIR", "rehearse with your data on the tiny model"),
        (
            "sam3lora train dense --data-dir DIR",
            "train on facebook/sam3: needs a GPU, and access to the model on huggingface.co",
        ),
    ]
