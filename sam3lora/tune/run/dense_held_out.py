"""The measurement of dense folders on a held-out split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3lora.config import Config
from sam3lora.data.split_files import SplitFiles
from sam3lora.evaluation.ask.dense_run import evaluate_dense
from sam3lora.evaluation.dense.comparison import differences_to_first
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.skipped_images import check_same_images
from sam3lora.tune.run.held_out import BASE_CONFIGURATION, BEST_TRIAL, model_options, result_of

SHOWN = ("mean_iou", "mean_iou_foreground", "boundary_iou", "pixel_accuracy")


def measure_dense_held_out(
    split: SplitFiles,
    base_folder: Path | None,
    best_folder: Path,
    config: Config,
    *,
    metric: str = "mean_iou",
    num_workers: int | None = 0,
    address: str | None = None,
) -> dict[str, Any]:
    """As `measure_held_out`, of dense folders.

    The plain model has no head, so without a folder of the base configuration nothing is compared. For valid_loss,
    mean_iou is measured.
    """
    metric = "mean_iou" if metric == "valid_loss" else metric
    folders = {} if base_folder is None else {BASE_CONFIGURATION: base_folder}
    is_same = base_folder is not None and base_folder.resolve() == best_folder.resolve()
    if not is_same:
        folders[BEST_TRIAL] = best_folder
    settings = DenseEvaluation(
        batch_size=config.training.images_per_forward,
        annotation_file=config.data.annotation_file,
        on_bad_image=config.training.on_bad_image,
    )
    first, *others = (
        evaluate_dense(
            split,
            folder,
            settings,
            label=label,
            num_workers=num_workers,
            address=address,
            **model_options(config),
        )
        for label, folder in folders.items()
    )
    check_same_images([first, *others])
    best = others[0] if others else first
    interval = differences_to_first(first, others)[BEST_TRIAL].get(metric) if others else None
    models = {BASE_CONFIGURATION: first, BEST_TRIAL: best} if base_folder is not None else {BEST_TRIAL: best}
    values = {label: one.values for label, one in models.items()}
    return result_of(
        split, best, metric, values, SHOWN, reference=BASE_CONFIGURATION, interval=interval, is_same=is_same
    )
