"""The whole product in a few minutes: draw data, train on it, measure, write a report."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sam3lora.config import Config, load_config
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.evaluation.metrics.comparison import Comparison
    from sam3lora.evaluation.metrics.measure import SplitMetrics
    from sam3lora.training.launch import TrainResult

NUM_TRAIN, NUM_VALID, NUM_PICTURES = 160, 48, 12
MARKER = ".sam3lora-demo"
"""Says that the folder is a demo's own, so that the next demo may replace what is in it."""


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and what it shows."""

    report: Path
    comparison: Comparison

    @property
    def base(self) -> SplitMetrics:
        return self.comparison.base

    @property
    def adapter(self) -> SplitMetrics:
        return self.comparison.adapters[0]


def run_demo(
    output_dir: str | Path,
    *,
    num_train: int = NUM_TRAIN,
    num_valid: int = NUM_VALID,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> DemoResult:
    """Teach the tiny SAM 3 four objects that it has never seen, and report how well it learned them.

    Leaves in `output_dir`: `data/` (COCO), `run/` (a run folder with the adapter), `metrics.json` and `report.html`.

    Args:
        output_dir: A new or empty folder, or one of an earlier demo, which is replaced.
        num_train: Training images to draw.
        num_valid: Validation images to draw.
        overrides: Changes to the preset `demo`, as `a.b=c`.
        console: Where to print; None is standard output.

    Raises:
        UserError: The folder holds something else, or an override is wrong.
    """
    started = time.perf_counter()
    console = console or Console(soft_wrap=True)
    folder = Path(output_dir).expanduser().absolute()
    data_dir, run_dir = folder / "data", folder / "run"
    paths = [f"training.data_dir={json.dumps(str(data_dir))}", f"output.output_dir={json.dumps(str(run_dir))}"]
    config = load_config("demo", [*overrides, *paths])
    _prepare_folder(folder)

    console.print(f"[bold]1/4[/] drawing {num_train} training and {num_valid} validation images")
    write_dataset(data_dir, num_train=num_train, num_valid=num_valid)

    console.print(f"[bold]2/4[/] training an adapter for {config.training.num_epochs} epochs")
    from sam3lora.training.launch import train

    result = train(config)

    console.print("[bold]3/4[/] measuring the base model and the adapter")
    with _quiet():
        comparison = _compare(config, data_dir, result.best_adapter)
    (folder / "metrics.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")

    console.print("[bold]4/4[/] writing the report")
    report, steps = folder / "report.html", next_steps(output_dir)
    report.write_text(_render(config, result, comparison, steps), encoding="utf-8")
    _print_summary(console, report, comparison, steps, time.perf_counter() - started)
    return DemoResult(report, comparison)


def _prepare_folder(folder: Path) -> None:
    """Mark the folder as a demo's own and remove what an earlier demo left."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise UserError(f"{folder} is not empty and is no folder of a demo: name another one with --output")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for name in ("data", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars and deprecation notices of the libraries."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _compare(config: Config, data_dir: Path, adapter: Path) -> Comparison:
    from sam3lora.data.synth.dataset import NOUNS
    from sam3lora.evaluation.ask.run import evaluate_models
    from sam3lora.evaluation.ask.worker import Models
    from sam3lora.evaluation.metrics.comparison import compare
    from sam3lora.training.validator import evaluation_settings

    device = "cuda" if config.scaling.use_gpu is True else "cpu"
    base, of_adapter = evaluate_models(
        data_dir / config.data.valid_split,
        Models({"adapter": str(adapter)}, options={"device": device}),
        replace(evaluation_settings(config), categories=NOUNS["shift"]),
        progress=True,
    )
    return compare(base, [of_adapter])


def _render(config: Config, result: TrainResult, comparison: Comparison, steps: Sequence[tuple[str, str]]) -> str:
    from sam3lora.evaluation.report.demo_page import render_demo_report
    from sam3lora.evaluation.report.pictures import comparison_pictures
    from sam3lora.model.adapter.metadata import current_versions

    training, lora = config.training, config.lora
    threshold = config.evaluation.threshold
    size_mb = sum(file.stat().st_size for file in result.best_adapter.glob("*.safetensors")) / 1e6
    settings = {
        "base model": config.model.name,
        "adapter": f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.components)}",
        "training": f"{training.num_epochs} epochs, {training.batch_size} images a worker and step, "
        f"{config.scaling.num_workers} Ray workers, learning rate {training.learning_rate:g}, seed {training.seed}",
        "adapter folder": str(result.best_adapter),
        "versions": ", ".join(f"{name} {version}" for name, version in current_versions().items()),
    }
    return render_demo_report(
        comparison,
        history=result.history,
        pictures=comparison_pictures(comparison.base, comparison.adapters[0], count=NUM_PICTURES),
        facts={"adapter size": f"{size_mb:.1f} MB", "training time": _duration(result.seconds)},
        settings=settings,
        next_steps=steps,
        threshold=threshold,
    )


def next_steps(folder: str | Path = "outputs/demo") -> list[tuple[str, str]]:
    """Commands and what they do, beginning with the adapter of a demo in this folder."""
    adapter, data = (shlex.quote(str(Path(folder) / name)) for name in ("run/best", "data"))
    return [
        (
            f"sam3lora infer --weights {adapter} --image {data}/valid --prompt gear bolt --output outputs/found",
            "what the adapter sees in a folder of images: pictures, and JSON with masks",
        ),
        (
            f"sam3lora compare --weights {adapter} --val-data-dir {data}",
            "base and adapter in full: intervals, and pictures of every category",
        ),
        ("sam3lora data check DIR", "what your own COCO data set (DIR/train, DIR/valid) holds, and every fault in it"),
        ("sam3lora train quick_test --data-dir DIR", "a rehearsal with your data on the tiny model; a CPU is enough"),
        (
            "sam3lora train balanced --data-dir DIR",
            "an adapter for facebook/sam3: needs a GPU, and access to the model on huggingface.co",
        ),
        ("sam3lora train balanced --data-dir DIR --device 0 1 2 3", "the same on four GPUs of one machine"),
    ]


def _print_summary(
    console: Console, report: Path, comparison: Comparison, steps: Sequence[tuple[str, str]], seconds: float
) -> None:
    from sam3lora.evaluation.report.demo_page import comparison_rows, verdict

    def score(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    table = Table("", "base", "adapter", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison_rows(comparison):
        table.add_row(row.label, score(row.base), score(row.adapter))
    console.print()
    console.print(table)
    console.print(verdict(comparison))
    console.print(f"Report: {report}  ({_duration(seconds)} in all)")
    console.print("\n[bold]What to do next[/]")
    for command, purpose in steps:
        console.print(f"  [cyan]{command}[/]\n      {purpose}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
