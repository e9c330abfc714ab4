"""`sam3lora demo`: draw data, train on it, measure and write a report, in a few minutes on a CPU."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sam3lora.cli import dense_demo
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.config import Config

NUM_TRAIN, NUM_VALID = 160, 48
MARKER = ".sam3lora-demo"
"""A file that says that the folder belongs to a demo: the next demo may replace its content."""

_FOLDERS = ("data", "run", "base", "adapter", "predictions", "pictures")
_FILES = ("comparison.json", "report.html", "metrics.json")


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the data, the run and the report.")] = Path(
        "outputs/demo"
    ),
    task: Annotated[
        Literal["detection", "dense"], typer.Option("--task", help="Find objects of prompts, or label each pixel.")
    ] = "detection",
) -> None:
    """Make a small labelled set, train an adapter on two workers, measure it and write a report.

    Example:  sam3lora demo --output outputs/demo
    """
    run_demo(output, task=task)


def run_demo(
    output_dir: str | Path,
    *,
    num_train: int = NUM_TRAIN,
    num_valid: int = NUM_VALID,
    overrides: Sequence[str] = (),
    task: Literal["detection", "dense"] = "detection",
) -> Path:
    """Teach the tiny SAM 3 four kinds of objects that it has never seen, and report how well it learned them.

    Leaves in `output_dir`: `data/` (COCO), `run/` (a run folder with the adapter) and what `sam3lora compare` writes,
    or with task dense `validate`.

    Args:
        output_dir: A new or empty folder, or one of an earlier demo, which is replaced.
        overrides: Changes to the preset `demo`, or `dense_demo`, as `a.b=c`.

    Returns:
        The report.

    Raises:
        UserError: The folder holds something else, or an override is wrong.
    """
    from sam3lora.config import load_config

    started = time.perf_counter()
    folder = Path(output_dir).expanduser().absolute()
    data_dir, run_dir = folder / "data", folder / "run"
    paths = [f"training.data_dir={json.dumps(str(data_dir))}", f"output.output_dir={json.dumps(str(run_dir))}"]
    config = load_config("dense_demo" if task == "dense" else "demo", [*overrides, *paths])
    _prepare_folder(folder)

    typer.echo(f"1/3 drawing {num_train} training and {num_valid} validation images")
    from sam3lora.data.synth.dataset import write_dataset

    write_dataset(data_dir, num_train=num_train, num_valid=num_valid)

    typer.echo(f"2/3 training for {config.training.num_epochs} epochs")
    from transformers.utils.logging import disable_progress_bar

    from sam3lora.training.launch import train

    disable_progress_bar()  # of weights, which are read in a moment
    best = train(config).best_adapter
    if task == "dense":
        report, steps = dense_demo.measure(config, best, folder), dense_demo.next_steps(output_dir)
    else:
        report, steps = _compare(config, best, folder), next_steps(output_dir)

    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    typer.echo(f"Time: {minutes} min {seconds} s\n\nWhat to do next")
    for command, purpose in steps:
        typer.echo(f"  {typer.style(command, fg='cyan')}\n      {purpose}")
    return report


def _compare(config: Config, adapter: Path, folder: Path) -> Path:
    typer.echo("3/3 measuring the base model and the adapter")
    from sam3lora.data.synth.dataset import NOUNS
    from sam3lora.evaluation.ask.run import evaluate_models
    from sam3lora.evaluation.ask.worker import Models
    from sam3lora.evaluation.report.saving import compare_and_save
    from sam3lora.training.validator import evaluation_settings

    models = Models({"adapter": str(adapter)}, options={"device": "cuda" if config.scaling.use_gpu is True else "cpu"})
    # The base is asked for all that the adapter was trained on, whether or not the validation images show it.
    settings = evaluation_settings(config.changed({"data.categories": NOUNS["shift"]}))
    split = config.training.required_data_dir() / config.data.valid_split
    base, with_adapter = evaluate_models(split, models, settings, progress=True)
    return compare_and_save(base, [with_adapter], folder)


def _prepare_folder(folder: Path) -> None:
    """Mark the folder as a demo's own, and remove what an earlier demo left."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise UserError(f"{folder} is not empty and not the folder of a demo: name another one with --output")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def next_steps(folder: str | Path = "outputs/demo") -> list[tuple[str, str]]:
    """Commands and what they do; the first ones use the adapter of a demo in this folder."""
    adapter, data = (shlex.quote(str(Path(folder) / name)) for name in ("run/best", "data"))
    return [
        (
            f"sam3lora infer --weights {adapter} --image {data}/valid --prompt gear bolt --output outputs/found",
            "find gears and bolts in a folder of images: pictures, and JSON with masks",
        ),
        (
            f"sam3lora compare --weights {adapter} --val-data-dir {data}",
            "measure base and adapter again, on these or other images",
        ),
        ("sam3lora data check DIR", "count the objects of your own COCO data set (DIR/train, DIR/valid), find faults"),
        ("sam3lora train quick_test --data-dir DIR", "rehearse with your data on the tiny model; a CPU is enough"),
        (
            "sam3lora train balanced --data-dir DIR",
            "train an adapter for facebook/sam3: needs a GPU, and access to the model on huggingface.co",
        ),
        ("sam3lora train balanced --data-dir DIR --device 0 1 2 3", "the same on four GPUs of one machine"),
    ]
