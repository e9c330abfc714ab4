"""Writing the folder of an evaluation by clicks (metrics, report), and printing its table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.metrics.bootstrap import Interval, ValueInterval
from sam3lora.evaluation.report.click_glossary import CLICK_MEASURES, is_count
from sam3lora.evaluation.report.result_files import left_out_notes, make_folder, write_json, write_text


def save_click_validation(metrics: ClickMetrics, output: str | Path, console: Console | None = None) -> Path:
    """Write `metrics.json` and `report.html`; return the report's path.

    Raises:
        UserError: The folder cannot be written.
    """
    from sam3lora.evaluation.report.click_page import render_click_report

    folder = make_folder(output)
    write_json(folder / "metrics.json", metrics.to_dict())
    report = folder / "report.html"
    write_text(report, render_click_report(metrics))
    console = console or Console(soft_wrap=True, markup=False, emoji=False)
    console.print(_table(metrics))
    console.print(f"{metrics.num_objects} objects in {metrics.num_images_with_objects} of {metrics.num_images} images")
    for note in left_out_notes(metrics.faults, metrics.skipped_images, metrics.num_images):
        console.print(f"Note: {note}")
    for note in metrics.notes:
        console.print(f"Note: {note}")
    console.print(f"Report: {report}")
    return report


def _table(metrics: ClickMetrics) -> Table:
    has_prompt = metrics.from_text is not None
    table = Table(metrics.label, "clicks alone", "95 % interval", *(("after a prompt", "clicks saved") * has_prompt))
    for measure in CLICK_MEASURES:
        if measure.name not in metrics.alone:
            continue
        alone = metrics.alone[measure.name]
        decimals = 0 if is_count(measure) else 3
        cells = [measure.label, _text(alone.value, decimals), _ends(alone, decimals)]
        if metrics.from_text is not None:
            saved = metrics.saved.get(measure.name)
            cells += [_text(metrics.from_text[measure.name].value, decimals), "" if saved is None else _saved(saved)]
        table.add_row(*cells)
    return table


def _text(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


def _ends(interval: ValueInterval, decimals: int) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:.{decimals}f} to {interval.high:.{decimals}f}"


def _saved(saved: Interval) -> str:
    if saved.difference is None:
        return "n/a"
    return f"{saved.difference:+.2f}" + ("" if saved.low is None else f" ({saved.low:+.2f} to {saved.high:+.2f})")
