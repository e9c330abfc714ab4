"""The options that `validate` and `compare` share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3lora.cli.shared_options import check_merge_iou, written_post
from sam3lora.config.post_processing import PostProcessing
from sam3lora.config.training import OnBadImage
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.data.split_files import SplitFiles
    from sam3lora.evaluation.ask.worker import Models
    from sam3lora.evaluation.settings import EvaluationSettings

ConfigOption = Annotated[
    str | None, typer.Option("--config", help="Preset or YAML file: model, data and thresholds, where no option says.")
]
WeightsOption = Annotated[
    list[str] | None, typer.Option("--weights", metavar="DIR ...", help="Adapter folders (such as outputs/run/best).")
]
DataOption = Annotated[
    str | None, typer.Option("--val-data-dir", metavar="DIR", help="A COCO split, or the folder that holds it.")
]
SplitOption = Annotated[str, typer.Option(help="Split to take when DIR holds several.")]
SamplesOption = Annotated[int | None, typer.Option("--num-samples", help="The first so many images only.")]
ModelOption = Annotated[str | None, typer.Option(help='Base model: "tiny", a hub id or a folder.')]
ResolutionOption = Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")]
DeviceOption = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where to compute; a GPU if there is one.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, help="Ray workers; 0 = in this process (default: one for each of several GPUs, or 0)."),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Images at a time.")]
OnBadImageOption = Annotated[
    OnBadImage | None,
    typer.Option(
        "--on-bad-image",
        help="An image that is missing or cannot be read: stop, or skip it, measure the others, and name it in the "
        "results (default: training.on_bad_image of --config, else stop).",
    ),
]
LowestScoreOption = Annotated[
    str | None,
    typer.Option(
        "--lowest-score",
        metavar="SCORE|auto",
        help="Detections below it are not measured, which saves time and memory "
        "(auto: 0 on up to 4,000 pairs of image and prompt, 0.001 on more).",
    ),
]
SemanticOption = Annotated[
    bool, typer.Option("--semantic", help="Measure SAM 3's semantic output too: mean IoU and dice of pixels.")
]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster to work on.")]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the results.")]


def read_config(source: str | None) -> Config | None:
    from sam3lora.config import load_config

    return None if source is None else load_config(source)


def adapter_folders(weights: list[str] | None, config: Config | None) -> dict[str, str]:
    """Label -> folder of the adapters named, or of the best one in the run folder that a configuration names."""
    from sam3lora.evaluation.ask.run import label_of

    if not weights and config is not None:
        best = Path(config.output.output_dir) / "best"
        weights = [str(best)] if best.is_dir() else []
    folders: dict[str, str] = {}
    for folder in weights or []:
        folders[label_of(folder, folders)] = str(Path(folder).expanduser().absolute())
    return folders


def named_split(data_dir: str | None, split: str, config: Config | None) -> SplitFiles:
    """The split named, or the validation split that a configuration names; UserError if neither names one."""
    from sam3lora.data.split_files import find_split_or_whole

    if data_dir is not None:
        return find_split_or_whole(data_dir, split, *([config.data.annotation_file] if config is not None else []))
    if config is not None and config.training.data_dir is not None:
        return find_split_or_whole(config.training.data_dir, config.data.valid_split, config.data.annotation_file)
    raise UserError("no images to measure on: name a COCO split with --val-data-dir DIR, or a --config that has one")


def models_of(
    adapters: dict[str, str],
    config: Config | None,
    *,
    with_base: bool,
    model: str | None,
    resolution: int | None,
    device: str | None,
) -> Models:
    """What to ask; adapters bring their own base, resolution and CLS setting along."""
    from sam3lora.evaluation.ask.worker import Models
    from sam3lora.model.adapter.folder import read_metadata

    options: dict[str, Any] = {"model": model, "resolution": resolution, "device": device}
    says_nothing = all(read_metadata(folder) is None for folder in adapters.values())
    if config is not None:
        options["local_files_only"] = config.model.local_files_only
        options["resolution"] = config.model.resolution if resolution is None else resolution
        if model is None and says_nothing:
            options |= {"model": config.model.name, "revision": config.model.revision}
        if says_nothing:
            options["geometry_cls"] = config.model.geometry_cls
    return Models(adapters, with_base=with_base, options=options)


def lowest_score_of(text: str | None) -> float | str | None:
    """The value of `--lowest-score`; UserError if it is neither a number nor auto."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--lowest-score must be a number or auto, got {text!r}") from None


def settings_of(
    adapters: dict[str, str], config: Config | None, post: dict[str, Any], **given: Any
) -> EvaluationSettings:
    """How to measure: options win over what a configuration file says, and that over what the adapters record.

    `adapters` maps labels to folders; `post` and `given` are options, None where one was not given.
    """
    from sam3lora.evaluation.ask.run import recorded_data
    from sam3lora.evaluation.settings import EvaluationSettings

    if config is None:
        settings = EvaluationSettings(**recorded_data(adapters))
    else:
        from sam3lora.training.validator import evaluation_settings

        settings = evaluation_settings(config).replaced_post(written_post(config))
    settings = settings.changed(**{name: value for name, value in (given | post).items() if value is not None})
    check_merge_iou(post.get("merge_iou"), _merges(settings, adapters))
    return settings


def _merges(settings: EvaluationSettings, adapters: dict[str, str]) -> bool:
    from sam3lora.model.adapter.metadata import read_metadata, recorded_post_processing

    recorded = [recorded_post_processing(read_metadata(folder)) for folder in adapters.values()]
    return any(settings.post_processing(post).merge for post in (*recorded, PostProcessing()))
