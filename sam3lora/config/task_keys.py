"""Keys that have no effect with a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .metrics import METRICS

if TYPE_CHECKING:
    from .root import Config

_NO_PROMPTS = "no prompt is asked"
_NO_OBJECTS = "no object is found"
_IDLE_WITHOUT_PROMPTS = {
    "training.num_negatives": _NO_PROMPTS,
    "training.one_to_many": _NO_OBJECTS,
    "training.cuda_graphs": "graphs are of the detector",
    "model.geometry_cls": _NO_PROMPTS,
    "data.prompts": _NO_PROMPTS,
    "data.negative_prompts": _NO_PROMPTS,
    "data.max_objects_per_query": _NO_PROMPTS,
    "evaluation.threshold": _NO_OBJECTS,
    "evaluation.prompt_thresholds": _NO_OBJECTS,
    "evaluation.nms": _NO_OBJECTS,
    "evaluation.nms_iou": _NO_OBJECTS,
    "evaluation.merge": _NO_OBJECTS,
    "evaluation.merge_iou": _NO_OBJECTS,
    "evaluation.max_detections": _NO_OBJECTS,
    "evaluation.lowest_score": _NO_OBJECTS,
}


def problems_without_prompts(config: Config, reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each key that is set and has no effect with a task that asks no prompts.

    Args:
        reasons: Why a key `section.name` has no effect with this task, beside those of all such tasks or instead. A key
            that stands for a section stands for all of its keys.
    """
    for key, reason in (_IDLE_WITHOUT_PROMPTS | dict(reasons)).items():
        section, name = key.split(".")
        values = getattr(config, section)
        if getattr(values, name) != type(values).model_fields[name].get_default(call_default_factory=True):
            yield f"{key} has no effect with task {config.task}, where {reason}: remove it"
    if config.training.max_prompts_per_forward not in ("auto", 1):  # 1 is what auto becomes
        yield (
            f"training.max_prompts_per_forward has no effect with task {config.task}, where {_NO_PROMPTS}: remove it"
        )


def metric_problems(config: Config) -> Iterator[str]:
    """A line if `evaluation.best_metric` is one of another task."""
    chosen, measured = config.evaluation.best_metric, METRICS[config.task]
    if chosen not in ("auto", "valid_loss", *measured):
        yield f"evaluation.best_metric {chosen} is not measured with task {config.task}: write {' or '.join(measured)}"
