"""Writing the folder of a dense model's evaluation (metrics, report), and printing its table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam3lora.data.fault_report import left_out_sentence
from sam3lora.evaluation.dense.measure import DenseMetrics
from sam3lora.evaluation.report.result_files import make_folder, write_json, write_text

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
    console = console or Console(soft_wrap=True, markup=False, emoji=False)
    table = Table("", metrics.label, "95 % interval")
    for title, name in _SHOWN.items():
        if name in metrics.values:
            table.add_row(title, *_texts(metrics, name))
    for name, entry in metrics.per_class.items():
        table.add_row(
            f"IoU {name}", "n/a" if entry.iou is None else f"{entry.iou:.3f}", _texts(metrics, f"iou/{name}")[1]
        )
    console.print(table)
    console.print(f"{metrics.num_images} images, {metrics.num_empty_images} without any class")
    if left_out := left_out_sentence(metrics.faults):
        console.print(f"Note: {left_out}, see the report")
    for note in metrics.notes:
        console.print(f"Note: {note}")
    console.print(f"Report: {report}")
    return report


def _texts(metrics: DenseMetrics, name: str) -> tuple[str, str]:
    """A value and its interval."""
    value, interval = metrics.values.get(name), metrics.intervals.get(name)
    known = interval is not None and interval.low is not None
    return (
        "n/a" if value is None else f"{value:.3f}",
        f"{interval.low:.3f} to {interval.high:.3f}" if interval is not None and known else "",
    )
