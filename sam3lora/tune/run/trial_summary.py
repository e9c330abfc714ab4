"""Completing a trial's record from its run folder, where all is that a killed trial has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3lora.config.metrics import METRICS
from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import read_metadata
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics
from sam3lora.tune.run.ledger import TrialRecord, better, read_trial_record
from sam3lora.tune.space.search_space import Search

_OF_PROMPTS = ("map", "map_50", "map_75", "bbox_map", "cgf1", "off_prompt_fpr", "presence_accuracy")
_OF_LABELS = ("mean_iou", "mean_iou_foreground", "pixel_accuracy")
MEASURED = ("valid_loss", *_OF_PROMPTS, *_OF_LABELS, *METRICS["clicks"])


def current_record(folder: Path, search: Search) -> TrialRecord:
    """The record in a trial's folder; that of a trial which has not ended includes the latest lines of its run.

    Raises:
        UserError: The record is missing or damaged.
    """
    record = read_trial_record(folder)
    if not record.has_ended:
        summarise(record, folder, search)
    return record


def summarise(record: TrialRecord, folder: Path, search: Search) -> None:
    """Take over what a run has logged: history, the value of `best/`, time, speed and memory. The status stays."""
    metric = search.metric
    lines = read_metrics(folder / METRICS_FILE)
    kept = ("epoch", "step", "train_loss", *MEASURED)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    record.history = [{"time": e["unix_time"]} | {name: e[name] for name in kept if name in e} for e in epochs]
    record.epochs = max((entry["epoch"] for entry in record.history), default=0)
    best = _of_saved_adapter(folder) or _best_entry(record.history, metric, search.mode)
    record.value, record.best_epoch = best.get(metric), best.get("epoch")
    record.metrics = {name: best[name] for name in MEASURED if best.get(name) is not None}
    steps = [line for line in lines if line["kind"] == "step"]
    if steps:
        record.images_per_second = steps[-1]["images_per_second"]
        record.memory_mb = max(line["memory_mb"] for line in steps)
    attempts = _attempts(lines)
    # Time spent training: from each start to the last line before the next one.
    record.seconds = round(sum(attempt[-1]["unix_time"] - attempt[0]["unix_time"] for attempt in attempts), 3)
    record.vision_passes = sum(_last(attempt, "vision_passes") for attempt in attempts)
    record.features_loaded = sum(_last(attempt, "features_loaded") for attempt in attempts)


def _of_saved_adapter(folder: Path) -> dict[str, Any]:
    """The metrics of the adapter in `best/`. They can differ from the log: a killed trial may have saved a better
    adapter before it wrote the line, or the other way round."""
    try:
        saved = read_metadata(folder / "best")
    except UserError:
        return {}
    return saved.metrics if saved is not None and "epoch" in saved.metrics else {}


def _best_entry(history: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in history:
        if better(entry.get(metric), found.get(metric), mode):
            found = entry
    return found


def num_images(folder: Path) -> int | None:
    """Training and validation images of a run; None if it has not started."""
    starts = [line for line in read_metrics(folder / METRICS_FILE) if line["kind"] == "start"]
    return starts[0]["num_train_images"] + starts[0]["num_valid_images"] if starts else None


def _attempts(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of each start of the run; an interrupted trial has several starts."""
    attempts: list[list[dict[str, Any]]] = []
    for line in lines:
        if line["kind"] == "start" or not attempts:
            attempts.append([])
        attempts[-1].append(line)
    return attempts


def _last(lines: list[dict[str, Any]], name: str) -> int:
    return next((line[name] for line in reversed(lines) if name in line), 0)
