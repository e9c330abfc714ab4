"""The measurement of click adapters on a held-out split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3lora.config import Config
from sam3lora.config.metrics import METRICS
from sam3lora.data.split_files import SplitFiles
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.clicks.meter import click_differences
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.skipped_images import check_same_images
from sam3lora.model.clicks.adapter import read_click_metadata
from sam3lora.training.validator import evaluation_settings
from sam3lora.tune.run.held_out import BASE_CONFIGURATION, BEST_TRIAL, PLAIN_MODEL, model_options, result_of

SHOWN = ("noc_85", "nof_85", "mean_iou_1", "mean_iou_3", "mean_iou_8")


def measure_click_held_out(
    split: SplitFiles,
    base_folder: Path | None,
    best_folder: Path,
    config: Config,
    *,
    metric: str = METRICS["clicks"][0],
    num_workers: int | None = 0,
    address: str | None = None,
) -> dict[str, Any]:
    """As `measure_held_out`, of click adapters; the plain model is the base's own click head.

    Users click up to 20 times, from nothing. For valid_loss the first metric of the task is measured.
    """
    metric = METRICS["clicks"][0] if metric == "valid_loss" else metric
    settings = ClickEvaluation(start_from=None, prompting=evaluation_settings(config).changed(num_samples=None))

    def measure(folder: Path | None) -> ClickMetrics:
        resolution = config.model.resolution if folder is None else read_click_metadata(folder)[0].resolution
        return evaluate_clicks(
            split,
            config.clicks.vision_adapter,
            settings,
            click_adapter=folder,
            num_workers=num_workers,
            address=address,
            resolution=resolution,
            **model_options(config),
        )

    is_same = base_folder is not None and base_folder.resolve() == best_folder.resolve()
    found = {PLAIN_MODEL: measure(None)}
    if base_folder is not None:
        found[BASE_CONFIGURATION] = measure(base_folder)
    found[BEST_TRIAL] = best = found[BASE_CONFIGURATION] if is_same else measure(best_folder)
    check_same_images(list(found.values()))
    reference = PLAIN_MODEL if base_folder is None else BASE_CONFIGURATION
    values = {label: {name: one.value for name, one in of_model.alone.items()} for label, of_model in found.items()}
    differences = {} if is_same else click_differences(found[reference].clicks.alone, best.clicks.alone, [metric])
    return result_of(
        split, best, metric, values, SHOWN, reference=reference, interval=differences.get(metric), is_same=is_same
    )
