"""Writing the folder of an evaluation (metrics, predictions, report), and printing its table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.bad_images import SkippedImage
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.comparison import differences_to_base
from sam3lora.evaluation.metrics.measure import SplitMetrics
from sam3lora.evaluation.report.pictures import threshold_texts
from sam3lora.evaluation.report.result_files import left_out_notes, make_folder, told, write_json, write_text
from sam3lora.evaluation.skipped_images import skipped_note
from sam3lora.files import file_name_of

_SHOWN = {
    "mAP": "map",
    "mAP at IoU 0.50": "map_50",
    "box mAP": "bbox_map",
    "cgF1": "cgf1",
    "false alarms": "off_prompt_fpr",
    "presence accuracy": "presence_accuracy",
}


def save_validation(results: Sequence[SplitMetrics], output: str | Path, console: Console | None = None) -> Path:
    """Write `metrics.json`, `predictions.json` and `report.html`; several models have a folder each for the first two.

    Returns the report's path. Raises UserError if the folder cannot be written, as the other functions here do.
    """
    from sam3lora.evaluation.report.validation_page import render_validation_report

    folder = make_folder(output)
    if len(results) == 1:
        _write_model(results[0], folder)
    else:
        for metrics in results:
            _write_model(metrics, make_folder(folder / file_name_of(metrics.label, "model")))
        write_json(folder / "metrics.json", {"models": {metrics.label: metrics.to_dict() for metrics in results}})
    report = folder / "report.html"
    write_text(report, render_validation_report(results))
    _print(results, report, console)
    return report


def compare_and_save(
    base: SplitMetrics, adapters: Sequence[SplitMetrics], output: str | Path, console: Console | None = None
) -> Path:
    """Write each model's `metrics.json` and `predictions.json`, then `comparison.json` and `report.html` (returned)."""
    from sam3lora.evaluation.report.comparison_page import comparison_sentence, render_comparison_report

    folder = make_folder(output)
    results = [base, *adapters]
    for metrics in results:
        _write_model(metrics, make_folder(folder / file_name_of(metrics.label, "model")))
    differences = differences_to_base(base, adapters)
    listed = {label: {name: vars(one) for name, one in found.items()} for label, found in differences.items()}
    models = {metrics.label: metrics.to_dict() for metrics in results}
    write_json(folder / "comparison.json", {"models": models, "differences_to_base": listed})
    report = folder / "report.html"
    write_text(report, render_comparison_report(base, adapters, differences))
    _print(results, report, console)
    console = console or Console(soft_wrap=True, markup=False, emoji=False)
    for adapter in adapters:
        console.print(comparison_sentence(base, adapter, differences[adapter.label]))
    return report


def write_results(results: Mapping[str, Sequence[Mapping[str, Any]]], output: str | Path) -> dict[str, Path]:
    """Write each model's `predictions.json`, each in its own folder if there are several; return label -> file."""
    folder = make_folder(output)
    files = {}
    for label, entries in results.items():
        of_model = folder if len(results) == 1 else make_folder(folder / file_name_of(label, "model"))
        files[label] = of_model / "predictions.json"
        write_json(files[label], entries, indent=None)
    return files


def save_saco(
    predictions: Mapping[str, Path],
    ground_truth: Sequence[Path],
    output: str | Path,
    image_ids: Collection[int] | None = None,
    skipped: Sequence[SkippedImage] = (),
) -> None:
    """Measure results in SA-Co's format; write `metrics.json` (label -> "segm", "bbox" -> metrics) and print a table.

    Args:
        predictions: Label -> results file.
        ground_truth: One file for each annotator.
        image_ids: Image entries to judge; None takes all.
        skipped: Image entries that were to be judged and could not be read: `skipped_images` in the file, if there are.

    Raises:
        UserError: A file is damaged, or the files belong to different splits.
    """
    from sam3lora.evaluation.metrics.cgf1 import IouType
    from sam3lora.evaluation.metrics.saco import evaluate_saco

    table = Table("", "masks", "boxes")
    values: dict[str, dict[str, Any]] = {}
    reason = None
    iou_types: tuple[IouType, ...] = ("segm", "bbox")
    for label, file in predictions.items():
        found = {iou_type: evaluate_saco(ground_truth, file, iou_type, image_ids) for iou_type in iou_types}
        values[label] = {name: entry.metrics() | {"counts": entry.counts()} for name, entry in found.items()}
        reason = found["segm"].undefined_reason
        for name in ("cgF1", "positive_micro_F1", "IL_MCC", "cgF1@0.5", "cgF1@0.75", "IL_FPR"):
            table.add_row(f"{label}: {name}", *(f"{values[label][iou_type][name]:.4f}" for iou_type in iou_types))
    folder = make_folder(output)
    listed = [image._asdict() for image in skipped]
    written: dict[str, Any] = dict(values if len(values) > 1 else next(iter(values.values())))
    write_json(folder / "metrics.json", written | ({"skipped_images": listed} if listed else {}))
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    if reason:
        console.print(f"cgF1 is 0 whatever the model does: {reason}")
    if listed:
        console.print(f"Note: {skipped_note(listed, len(image_ids or ()), 'phrases')}")
    console.print(f"Metrics: {folder / 'metrics.json'}")


def _write_model(metrics: SplitMetrics, folder: Path) -> None:
    write_json(folder / "metrics.json", metrics.to_dict())
    if metrics.predictions is not None:
        with told(folder / "predictions.json"):
            index = metrics.truth.index
            metrics.predictions.write(folder / "predictions.json", index.image_ids.written, index.category_ids.written)


def _print(results: Sequence[SplitMetrics], report: Path, console: Console | None) -> None:
    console = console or Console(soft_wrap=True, markup=False, emoji=False)
    table = Table("", *(metrics.label for metrics in results))
    for column in table.columns[1:]:
        column.justify = "right"
    shown = _SHOWN | ({"semantic mean IoU": "semantic_mean_iou"} if "semantic" in results[0].settings else {})
    for title, name in shown.items():
        values = [getattr(metrics, name) for metrics in results]
        table.add_row(title, *("n/a" if value is None else f"{value:.3f}" for value in values))
    first = results[0]
    table.add_row("detections", *(str(metrics.num_detections) for metrics in results))
    console.print(table)
    console.print(f"{first.num_images} images, {first.num_ground_truth} objects, threshold {threshold_texts(results)}")
    for note in left_out_notes(first.faults, first.skipped_images, first.num_images):
        console.print(f"Note: {note}")
    for note in dict.fromkeys(note for metrics in results for note in metrics.notes):
        console.print(f"Note: {note}")
    console.print(f"Report: {report}")


def record_best_threshold(metrics: SplitMetrics, adapter: str | Path, *, per_prompt: bool = False) -> str:
    """Write the threshold into the adapter folder, with the post-processing that it was measured with.

    With `per_prompt` also a threshold for each prompt; a prompt that has none of its own uses the overall one. Returns
    a line that says what was written.

    Raises:
        UserError: No threshold finds anything right, or the folder cannot be written.
    """
    from sam3lora.model.adapter.folder import record_post_processing

    sweep = metrics.sweep
    if sweep is None or sweep.best_threshold is None:
        raise UserError(f"{metrics.label}: no threshold was saved, because no detection is right at any threshold")
    thresholds = {}
    if per_prompt:
        for category in metrics.truth.categories:
            curve = sweep.per_category.get(category.id)
            if curve is not None and curve.best_threshold is not None:
                thresholds[category.prompt] = curve.best_threshold
    measured = PostProcessing(**{name: metrics.settings[name] for name in PostProcessing.model_fields})
    record_post_processing(adapter, measured.changed(threshold=sweep.best_threshold, prompt_thresholds=thresholds))
    own = "".join(f", {prompt}: {value:.2f}" for prompt, value in thresholds.items())
    return f"{metrics.label}: saved threshold {sweep.best_threshold:.2f}{own} in {adapter}"
