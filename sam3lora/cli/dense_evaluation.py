"""`sam3lora validate` and `compare` of folders of task dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sam3lora.cli.evaluation_options import named_split
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


class DenseMeasurement(NamedTuple):
    """What to measure dense folders on, and how; `options` are other arguments of `evaluate_dense`."""

    split: SplitFiles
    settings: DenseEvaluation
    options: dict[str, Any]


def dense_measurement(arguments: Mapping[str, Any], config: Config | None) -> DenseMeasurement:
    """From the `locals()` of a command; an option that was given wins over what a configuration file says.

    A dense folder brings its own base and resolution along.
    """
    from sam3lora.evaluation.dense.settings import DenseEvaluation

    of_file: dict[str, Any] = {}
    if config is not None:
        of_file = {
            "num_samples": config.evaluation.num_samples,
            "on_bad_image": config.training.on_bad_image,
            "threshold": config.dense.threshold if "threshold" in config.dense.model_fields_set else None,
        }
    names = ("threshold", "num_samples", "batch_size", "paper_normalisation", "on_bad_image")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    options = {name: arguments[name] for name in ("model", "resolution", "device", "num_workers", "address")}
    return DenseMeasurement(
        named_split(arguments["val_data_dir"], arguments["split"], config),
        DenseEvaluation(**of_file | given),
        options | {"local_files_only": config is not None and config.model.local_files_only},
    )


def validate_dense(folder: str, output: Path, how: DenseMeasurement) -> None:
    """Measure a folder and write the results."""
    from sam3lora.evaluation.ask.dense_run import evaluate_dense
    from sam3lora.evaluation.report.dense_saving import folder_for_maps, save_dense_validation

    keep_in = folder_for_maps(output)
    metrics = evaluate_dense(how.split, folder, how.settings, keep_in=keep_in, progress=True, **how.options)
    save_dense_validation(metrics, output)


def compare_dense(folders: Mapping[str, str], output: Path, how: DenseMeasurement) -> None:
    """Measure several folders, by label, on the same images, and write their differences to the first."""
    from sam3lora.evaluation.ask.dense_run import evaluate_dense
    from sam3lora.evaluation.dense.comparison import check_comparable
    from sam3lora.evaluation.report.dense_saving import compare_dense_and_save, folder_for_maps, model_folder
    from sam3lora.evaluation.skipped_images import check_same_images
    from sam3lora.model.dense.folder import read_dense_metadata
    from sam3lora.model.dense.settings import DenseSettings

    if len(folders) < 2:
        raise UserError(
            "nothing to compare with: the base has no dense head. Name two or more folders with --weights; the others "
            "are compared with the first"
        )
    models = {label: DenseSettings(**(read_dense_metadata(folder).dense or {})) for label, folder in folders.items()}
    check_comparable(models)
    places = {label: folder_for_maps(model_folder(output, label)) for label in folders}
    first, *others = [
        evaluate_dense(
            how.split, folder, how.settings, label=label, keep_in=places[label], progress=True, **how.options
        )
        for label, folder in folders.items()
    ]
    check_same_images([first, *others])
    compare_dense_and_save(first, others, output)
