"""`sam3lora validate` and `compare` of folders of task dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.data.split_files import SplitFiles
    from sam3lora.evaluation.dense.settings import DenseEvaluation

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
"""Arguments of `validate` and `compare` that have no effect on a dense folder, and their options."""
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


def dense_settings(config: Config | None, *, paper_normalisation: bool = False, **given: Any) -> DenseEvaluation:
    """How to measure: options, None where one was not given, win over what a configuration file says."""
    from sam3lora.evaluation.dense.settings import DenseEvaluation

    of_file: dict[str, Any] = {}
    if config is not None:
        of_file = {
            "num_samples": config.evaluation.num_samples,
            "skip_missing_images": config.training.on_bad_image == "skip",
            "threshold": config.dense.threshold if "threshold" in config.dense.model_fields_set else None,
        }
    values = of_file | {name: value for name, value in given.items() if value is not None}
    return DenseEvaluation(paper_normalisation=paper_normalisation, **values)


def validate_dense(
    folder: str, split: SplitFiles, output: Path, settings: DenseEvaluation, options: Mapping[str, Any]
) -> None:
    """Measure a folder and write the results; `options` are other arguments of `evaluate_dense`."""
    from sam3lora.evaluation.ask.dense_run import evaluate_dense
    from sam3lora.evaluation.report.dense_saving import save_dense_validation
    from sam3lora.evaluation.report.result_files import make_folder

    metrics = evaluate_dense(split, folder, settings, keep_in=make_folder(output), progress=True, **options)
    save_dense_validation(metrics, output)


def compare_dense(
    folders: Mapping[str, str], split: SplitFiles, output: Path, settings: DenseEvaluation, options: Mapping[str, Any]
) -> None:
    """Measure several folders, by label, on the same images, and write their differences to the first."""
    from sam3lora.evaluation.ask.dense_run import evaluate_dense
    from sam3lora.evaluation.dense.comparison import check_comparable
    from sam3lora.evaluation.report.dense_saving import compare_dense_and_save, model_folder
    from sam3lora.evaluation.report.result_files import make_folder
    from sam3lora.model.dense.folder import read_dense_metadata
    from sam3lora.model.dense.settings import DenseSettings

    if len(folders) < 2:
        raise UserError(
            "nothing to compare with: the base has no dense head. Name two or more folders with --weights; the others "
            "are compared with the first"
        )
    models = {label: DenseSettings(**(read_dense_metadata(folder).dense or {})) for label, folder in folders.items()}
    check_comparable(models)
    root = make_folder(output)
    first, *others = [
        evaluate_dense(
            split,
            folder,
            settings,
            label=label,
            keep_in=make_folder(model_folder(root, label)),
            progress=True,
            **options,
        )
        for label, folder in folders.items()
    ]
    compare_dense_and_save(first, others, output)
