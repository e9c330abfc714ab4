"""The options of post-processing, the same for `infer`, `validate`, `compare` and `jobs/predict.py`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError

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


def check_merge_iou(merge_iou: float | None, merges: bool) -> None:
    """
    Raises:
        UserError: `--merge-iou` was given, but nothing is merged.
    """
    if merge_iou is not None and not merges:
        raise UserError("--merge-iou has no effect: add --merge")
