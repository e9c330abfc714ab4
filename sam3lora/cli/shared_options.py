"""Options that several commands and `jobs/predict.py` share: post-processing, cleaned masks, GPUs, output folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sam3lora.cluster import check_job_path
from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.config import Config

_DEFAULTS = PostProcessing()


def _help(name: str) -> str:
    description = PostProcessing.model_fields[name].description
    return f"{description} (default: the adapter's, or {getattr(_DEFAULTS, name)})"


ThresholdOption = Annotated[
    float | None, typer.Option("--threshold", "--prob-threshold", "--detection-threshold", help=_help("threshold"))
]
NmsOption = Annotated[Literal["mask", "box", "none"] | None, typer.Option("--nms", help=_help("nms"))]
NmsIouOption = Annotated[float | None, typer.Option("--nms-iou", help=_help("nms_iou"))]
MergeOption = Annotated[bool | None, typer.Option("--merge/--no-merge", help=_help("merge"))]
MergeIouOption = Annotated[float | None, typer.Option("--merge-iou", help=_help("merge_iou"))]
MaxDetectionsOption = Annotated[int | None, typer.Option("--max-detections", help=_help("max_detections"))]
HoleAreaOption = Annotated[
    int | None,
    typer.Option(help="With clicks: fill holes in masks up to this area, in low-resolution pixels (default: 0)."),
]
SprinkleAreaOption = Annotated[
    int | None, typer.Option(help="With clicks: take specks out of masks up to this area, likewise (default: 0).")
]


def post_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `PostProcessing` that a command was given, from its `locals()`."""
    return {name: arguments[name] for name in PostProcessing.model_fields if arguments.get(name) is not None}


def written_post(config: Config) -> dict[str, Any]:
    """The fields of `PostProcessing` that a configuration file states, without those at their default."""
    names = config.evaluation.model_fields_set & set(PostProcessing.model_fields)
    return {name: getattr(config.evaluation, name) for name in names}


def check_merge_iou(merge_iou: float | None, merges: bool) -> None:
    """Raise UserError if `--merge-iou` was given, but nothing is merged."""
    if merge_iou is not None and not merges:
        raise UserError("--merge-iou has no effect: add --merge")


def gpu_indices(device: Sequence[str]) -> list[int]:
    """GPU numbers of `--device 0 1` or `--device 0,1`; none for `--device cpu`.

    Raises:
        UserError: Another word, a number twice, or cpu beside numbers.
    """
    words = [word for part in device for word in part.split(",")]
    if words == ["cpu"]:
        return []
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--device takes GPU numbers such as 0 1, or cpu; got {' '.join(device)}")
    gpus = [int(word) for word in words]
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--device names a GPU twice: {' '.join(device)}")
    return gpus


def choose_gpus(device: Sequence[str], address: str | None) -> None:
    """Hide all other GPUs from Ray and torch by `CUDA_VISIBLE_DEVICES`.

    Numbers count among the GPUs that this process may see: `--device 0` is GPU 4 where a scheduler has set
    `CUDA_VISIBLE_DEVICES=4,5`.

    Raises:
        UserError: The work runs on a cluster (`address` or `RAY_ADDRESS`), or a number is too large.
    """
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster and cluster != "local":
        raise UserError(
            f"--device chooses GPUs of this machine, but the work runs on the cluster {cluster}: give --num-workers "
            "instead"
        )
    gpus = gpu_indices(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        chosen = [str(gpu) for gpu in gpus]
    else:
        allowed = [name for name in visible.split(",") if name]
        if any(gpu >= len(allowed) for gpu in gpus):
            raise UserError(
                f"--device {' '.join(device)}: this process may see {len(allowed)} GPUs "
                f"(CUDA_VISIBLE_DEVICES={visible}), count from 0"
            )
        chosen = [allowed[gpu] for gpu in gpus]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def check_output_folder(path: str | Path, option: str) -> None:
    """Raise UserError for an output folder that is lost with a submitted job, or that cannot be made or written to."""
    check_job_path(path, option)
    folder = Path(path).expanduser().absolute()
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} is {path}, but {there} is not a folder that can be written to: choose another one")


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, or the innermost existing folder around it."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))
