"""`sam3lora validate --clicks`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.data.split_files import SplitFiles
    from sam3lora.evaluation.ask.worker import Models
    from sam3lora.evaluation.clicks.settings import ClickEvaluation
    from sam3lora.evaluation.settings import EvaluationSettings

OF_CLICKS = {
    "start_from": "--start-from",
    "clicks_vision": "--clicks-vision",
    "max_clicks": "--max-clicks",
    "max_hole_area": "--max-hole-area",
    "max_sprinkle_area": "--max-sprinkle-area",
}
"""Arguments of `validate` that have an effect with `--clicks` only, and their options."""
_OF_DETECTIONS = {
    "saco": "--saco",
    "save_threshold": "--save-threshold",
    "lowest_score": "--lowest-score",
    "semantic": "--semantic",
    "paper_normalisation": "--paper-normalisation",
}


def refuse_without_clicks(arguments: Mapping[str, Any]) -> None:
    """Raise UserError for options of clicks without `--clicks`, from the `locals()` of a command."""
    if idle := [option for name, option in OF_CLICKS.items() if arguments[name] is not None]:
        raise UserError(f"{', '.join(idle)} would have no effect: add --clicks, or leave it out")


def refuse_beside_clicks(arguments: Mapping[str, Any], post: Mapping[str, Any]) -> None:
    """Raise UserError for options that have no effect with `--clicks`; `post` are those of post-processing."""
    if idle := [option for name, option in _OF_DETECTIONS.items() if arguments[name]]:
        raise UserError(f"--clicks measures clicks on objects, so {', '.join(idle)} would have no effect: leave it out")
    if arguments["start_from"] == "none" and post:
        named = ", ".join("--" + name.replace("_", "-") for name in post)
        raise UserError(f"with --start-from none no prompt is asked, so {named} would have no effect: leave it out")


def adapters_of_clicks(
    folders: Mapping[str, str], with_base: bool, clicks_vision: str | None
) -> tuple[dict[str, str], str | None]:
    """The adapter that finds objects of prompts, by its label, and that of task clicks, where they are among folders.

    Raises:
        UserError: There are several of a kind, the base is named beside them, or `--clicks-vision` has no effect.
    """
    from sam3lora.model.adapter.metadata import CLICKS, read_metadata

    tasks = {label: getattr(read_metadata(folder), "task", None) for label, folder in folders.items()}
    of_clicks = [folders[label] for label, task in tasks.items() if task == CLICKS]
    others = {label: folders[label] for label, task in tasks.items() if task != CLICKS}
    if max(len(of_clicks), len(others)) > 1 or (with_base and folders):
        raise UserError(
            "--clicks measures one model at a time: name one adapter, one of task clicks, or one of each; or none for "
            "the base"
        )
    if clicks_vision is not None and not others:
        raise UserError("--clicks-vision chooses between an adapter and the base: name an adapter with --weights DIR")
    return others, next(iter(of_clicks), None)


def click_settings(prompting: EvaluationSettings, arguments: Mapping[str, Any]) -> ClickEvaluation:
    """How to measure, from the `locals()` of a command; None where an option was not given.

    Raises:
        UserError: A value is out of range.
    """
    from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
    from sam3lora.evaluation.clicks.settings import ClickEvaluation

    given = {name: arguments[name] for name in OF_CLICKS if arguments[name] is not None}
    areas = {name: given.pop(name) for name in ("max_hole_area", "max_sprinkle_area") if name in given}
    if given.get("start_from") == "none":
        given["start_from"] = None
    return ClickEvaluation(prompting=prompting, cleaning=MaskCleaning(**areas), **given)


def validate_clicks(
    split: SplitFiles,
    models: Models,
    output: Path,
    settings: ClickEvaluation,
    *,
    click_adapter: str | None,
    num_workers: int | None,
    address: str | None,
) -> None:
    """Measure a model and write the results; `click_adapter` is a folder of task clicks."""
    from sam3lora.evaluation.ask.click_run import evaluate_model_clicks
    from sam3lora.evaluation.report.click_saving import save_click_validation
    from sam3lora.evaluation.report.result_files import make_folder

    make_folder(output)
    metrics = evaluate_model_clicks(
        split,
        models,
        settings,
        click_adapter=click_adapter,
        num_workers=num_workers,
        address=address,
        progress=True,
    )
    save_click_validation(metrics, output)
