"""Which measurement decides `best/`, and what the run says when the loss and a metric disagree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from sam3lora.config import Config
from sam3lora.config.metrics import METRICS, is_lower_better
from sam3lora.data.coco import CocoIndex
from sam3lora.evaluation.ask.run import asked_categories
from sam3lora.evaluation.metrics.ground_truth import SplitTruth
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.training.datasets import RunData
from sam3lora.training.saved_run import LOSSES, RunState
from sam3lora.training.validator import evaluation_settings


def why_undefined(metric: str, index: CocoIndex, config: Config) -> str | None:
    """Why a metric has no value on a split, whatever a model predicts; None if it has one."""
    settings = evaluation_settings(config)
    index = index.first(settings.num_samples)
    categories = asked_categories(index, settings)
    found = measure_split(
        SplitTruth(index, categories),
        SplitResults(),
        exhaustive=settings.exhaustive,
        negative_prompts=settings.negative_prompts,
    )
    if getattr(found, metric) is not None:
        return None
    return "; ".join(note for note in found.notes if metric in note.split(":")[0]) or "; ".join(found.notes)


def deciding_metric(config: Config, data: RunData) -> tuple[str, str | None]:
    """The measurement that decides `best/`, and why it is not the configured one, if so.

    A metric that has no value on the validation images, whatever the model predicts, is replaced by box mAP, and where
    that has none either by the validation loss; without validation images the training loss decides.
    """
    chosen = config.evaluation.chosen_best_metric("detection")
    if data.valid is None or data.valid_complete is None:
        reason = None if chosen == "valid_loss" else f"there are no validation images to measure {chosen} on"
        return "train_loss", reason
    reasons: list[str] = []
    for metric in dict.fromkeys((chosen, "bbox_map")):
        reason = None if metric == "valid_loss" else why_undefined(metric, data.valid_complete, config)
        if reason is None:
            return metric, "; ".join(reasons) or None
        reasons.append(f"{metric} has no value on the validation images ({reason})")
    return "valid_loss", "; ".join(reasons)


def deciding_metric_of_labels(config: Config, data: RunData) -> tuple[str, str | None]:
    """As `deciding_metric`, where every metric has a value on labelled images."""
    chosen = config.evaluation.chosen_best_metric(config.task)
    if data.valid is None:
        return "train_loss", None if chosen == "valid_loss" else "there are no validation images to measure it on"
    return chosen, None


def is_improved(state: RunState, metric: str, measured: Mapping[str, Any]) -> bool:
    """Whether the adapter is the best so far by `metric`; updates the best values in `state`.

    Where the metric was not measured this time, the adapter is not compared.

    Args:
        measured: The loss, and the metrics where they were due, by name.
    """
    for name, value in measured.items():
        if name in (*LOSSES, *chain(*METRICS.values())) and value is not None:
            before = state.best_values.get(name)
            if before is None or _is_better(name, value, before[0]):
                state.best_values[name] = [value, state.step]
    value = measured.get(metric)
    if value is None:
        return False
    best = state.best_loss if metric in LOSSES else state.best_metric_value
    better = best is None or _is_better(metric, value, best)
    if better:
        state.best_loss = next(measured[name] for name in LOSSES if name in measured)
        state.best_metric_value = None if metric in LOSSES else value
        state.best_step = state.step
    state.evaluations_without_improvement = 0 if better else state.evaluations_without_improvement + 1
    return better


def disagreement(state: RunState, metric: str) -> str | None:
    """A sentence for a run whose lowest loss and best metric belong to different steps.

    The classification term is small for a model that finds nothing, and grows when it begins to find something: so the
    lowest loss may come too early.
    """
    losses = [name for name in LOSSES if name in state.best_values]
    others = [metric, "map", "bbox_map"] if metric not in LOSSES else ["map", "bbox_map"]
    metrics = [name for name in others if name in state.best_values]
    if not losses or not metrics:
        return None
    (loss, loss_step), (value, step) = state.best_values[losses[0]], state.best_values[metrics[0]]
    if loss_step == step:
        return None
    end = "lowest" if is_lower_better(metrics[0]) else "highest"
    return (
        f"the lowest {losses[0]} was {loss:.4g} at step {loss_step:g}, the {end} {metrics[0]} {value:.3f} at step "
        f"{step:g}; best/ is chosen by {metric}"
    )


def no_better_than_base(state: RunState, metric: str) -> str | None:
    """A sentence for a run whose best adapter is not better than the base was before the first step.

    None where the metric that decides was not measured of the base, or on other data.
    """
    best, before = state.best_values.get(metric), state.base_values.get(metric)
    if best is None or before is None or _is_better(metric, best[0], before):
        return None
    return (
        f"best/ is no better than the base: {metric} {best[0]:.4g}, of the base {before:.4g}; train longer, or try "
        "another training.learning_rate"
    )


def _is_better(name: str, value: float, before: float) -> bool:
    return value < before if is_lower_better(name) else value > before
