"""Writing the folder of a dense model's evaluation (metrics, report), and printing its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam3lora.errors import UserError
from sam3lora.evaluation.dense.map_files import LABELS, PROBABILITIES
from sam3lora.evaluation.dense.measure import DenseMetrics
from sam3lora.evaluation.report.result_files import left_out_notes, make_folder, told, write_json, write_text
from sam3lora.files import file_name_of
from sam3lora.model.adapter.metadata import DENSE

_SHOWN = {
    "mean IoU": "mean_iou",
    "mean IoU, without background": "mean_iou_foreground",
    "boundary IoU": "boundary_iou",
    "pixel accuracy": "pixel_accuracy",
    "S measure": "s_measure",
    "weighted F measure": "weighted_f",
    "mean absolute error": "mae",
}


def save_dense_validation(metrics: DenseMetrics, output: str | Path, console: Console | None = None) -> Path:
    """Write `metrics.json` and `report.html`; return the report's path. The maps were written while they were made.

    Raises:
        UserError: The folder cannot be written.
    """
    from sam3lora.evaluation.report.dense_page import render_dense_report

    folder = make_folder(output)
    write_json(folder / "metrics.json", metrics.to_dict())
    report = folder / "report.html"
    write_text(report, render_dense_report(metrics))
    console = console or _console()
    table = Table("", metrics.label, "95 % interval")
    for title, name in _SHOWN.items():
        if name in metrics.values:
            table.add_row(title, *_texts(metrics, name))
    for name, entry in metrics.per_class.items():
        table.add_row(
            f"IoU {name}", "n/a" if entry.iou is None else f"{entry.iou:.3f}", _texts(metrics, f"iou/{name}")[1]
        )
    console.print(table)
    _print_notes([metrics], report, console)
    return report


def compare_dense_and_save(
    first: DenseMetrics, others: Sequence[DenseMetrics], output: str | Path, console: Console | None = None
) -> Path:
    """Write each model's `metrics.json`, then `comparison.json` and `report.html`; return the report's path.

    Raises:
        UserError: The folder cannot be written.
    """
    from sam3lora.evaluation.dense.comparison import differences_to_first
    from sam3lora.evaluation.report.dense_comparison_page import DECIDING, render_dense_comparison, sentence

    folder = make_folder(output)
    results = [first, *others]
    for metrics in results:
        write_json(make_folder(model_folder(folder, metrics.label)) / "metrics.json", metrics.to_dict())
    differences = differences_to_first(first, others)
    listed = {label: {name: vars(one) for name, one in found.items()} for label, found in differences.items()}
    models = {metrics.label: metrics.to_dict() for metrics in results}
    write_json(folder / "comparison.json", {"models": models, "differences_to_first": listed})
    report = folder / "report.html"
    write_text(report, render_dense_comparison(first, others, differences))
    console = console or _console()
    table = Table("", *(metrics.label for metrics in results))
    for title, name in _SHOWN.items():
        if name in first.values:
            table.add_row(title, *(_texts(metrics, name)[0] for metrics in results))
    console.print(table)
    _print_notes(results, report, console)
    for other in others:
        console.print(sentence(first, other, differences[other.label].get(DECIDING)))
    return report


def folder_for_maps(path: Path) -> Path:
    """Make the folder of a model's results, without the maps of an earlier evaluation there; its absolute path.

    Raises:
        UserError: The folder cannot be written, or holds maps, or other files in their place, beside no metrics of a
            dense model.
    """
    folder = make_folder(path)
    places = [folder / name for name in (LABELS, PROBABILITIES)]
    if any(place.is_dir() and any(place.iterdir()) for place in places) and not _has_dense_metrics(folder):
        raise UserError(
            f"{folder} holds {LABELS}/ or {PROBABILITIES}/, but no metrics.json of a dense model beside them: whose "
            "they are is not known. Remove them, or choose another --output"
        )
    for place in places:
        with told(place):
            for old in place.rglob("*.png"):
                old.unlink()
    return folder


def _has_dense_metrics(folder: Path) -> bool:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and metrics.get("task") == DENSE


def model_folder(output: Path, label: str) -> Path:
    """The folder of one of several models."""
    return output / file_name_of(label, "model")


def _console() -> Console:
    return Console(soft_wrap=True, markup=False, emoji=False)


def _print_notes(results: Sequence[DenseMetrics], report: Path, console: Console) -> None:
    first = results[0]
    console.print(f"{first.num_images} images, {first.num_empty_images} without any class")
    for note in left_out_notes(first.faults, first.skipped_images, first.num_images):
        console.print(f"Note: {note}")
    for note in dict.fromkeys(note for metrics in results for note in metrics.notes):
        console.print(f"Note: {note}")
    console.print(f"Report: {report}")


def _texts(metrics: DenseMetrics, name: str) -> tuple[str, str]:
    """A value and its interval."""
    value, interval = metrics.values.get(name), metrics.intervals.get(name)
    known = interval is not None and interval.low is not None
    return (
        "n/a" if value is None else f"{value:.3f}",
        f"{interval.low:.3f} to {interval.high:.3f}" if interval is not None and known else "",
    )
