"""`sam3lora validate` of a folder of task dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.data.split_files import SplitFiles

OF_PROMPTS = {
    "use_base_model": "--use-base-model",
    "nms": "--nms",
    "nms_iou": "--nms-iou",
    "merge": "--merge",
    "merge_iou": "--merge-iou",
    "max_detections": "--max-detections",
    "lowest_score": "--lowest-score",
    "predictions": "--predictions",
    "saco": "--saco",
    "save_threshold": "--save-threshold",
    "semantic": "--semantic",
}
"""Arguments of `validate` that have no effect on a dense folder, and their options."""
_NOT_GIVEN: dict[str, tuple[Any, ...]] = {
    "use_base_model": (None, False),
    "semantic": (None, False),
    "saco": (None, []),
}


def dense_folders(adapters: Mapping[str, str]) -> list[str]:
    """Those of the folders, by label, that are of task dense."""
    from sam3lora.model.adapter.metadata import is_dense_folder

    return [folder for folder in adapters.values() if is_dense_folder(folder)]


def refuse_prompt_options(arguments: Mapping[str, Any]) -> None:
    """Raise UserError for arguments that are of prompts and objects, from the `locals()` of a command."""
    idle = [option for name, option in OF_PROMPTS.items() if arguments.get(name) not in _NOT_GIVEN.get(name, (None,))]
    if idle:
        raise UserError(
            f"a folder of task dense asks no prompts and finds no objects, so {', '.join(idle)} would have no effect: "
            "leave it out"
        )


def validate_dense(
    folder: str,
    split: SplitFiles,
    output: Path,
    config: Config | None,
    *,
    threshold: float | None,
    paper_normalisation: bool,
    num_samples: int | None,
    batch_size: int | None,
    num_workers: int | None,
    address: str | None,
    options: Mapping[str, Any],
) -> None:
    """Measure the folder and write the results; the arguments are those of `validate`."""
    from sam3lora.evaluation.ask.dense_run import evaluate_dense
    from sam3lora.evaluation.dense.settings import DenseEvaluation
    from sam3lora.evaluation.report.dense_saving import save_dense_validation
    from sam3lora.evaluation.report.result_files import make_folder

    given: dict[str, Any] = {"threshold": threshold, "num_samples": num_samples, "batch_size": batch_size}
    of_file: dict[str, Any] = {}
    if config is not None:
        of_file = {
            "num_samples": config.evaluation.num_samples,
            "skip_missing_images": config.training.on_bad_image == "skip",
            "threshold": config.dense.threshold if "threshold" in config.dense.model_fields_set else None,
        }
    given = of_file | {name: value for name, value in given.items() if value is not None}
    settings = DenseEvaluation(paper_normalisation=paper_normalisation, **given)
    metrics = evaluate_dense(
        split,
        folder,
        settings,
        keep_in=make_folder(output),
        num_workers=num_workers,
        address=address,
        progress=True,
        **options,
    )
    save_dense_validation(metrics, output)
