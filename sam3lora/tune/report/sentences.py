"""The sentences of a sweep's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sam3lora.config.metrics import is_lower_better
from sam3lora.evaluation.metrics.comparison import NOTICEABLE
from sam3lora.evaluation.report.click_glossary import CLICK_MEASURES
from sam3lora.evaluation.report.html_page import change, score
from sam3lora.tune.run.ledger import TrialRecord, has_value
from sam3lora.tune.space.parameters import Tied
from sam3lora.tune.space.search_space import SearchSpace

METRIC_LABELS = {one.name: one.label for one in CLICK_MEASURES} | {
    "valid_loss": "validation loss",
    "map": "mAP",
    "map_50": "mAP at IoU 0.50",
    "bbox_map": "box mAP",
    "cgf1": "cgF1",
    "off_prompt_fpr": "false alarms",
    "mean_iou": "mean IoU",
    "mean_iou_foreground": "mean IoU of the foreground",
    "boundary_iou": "boundary IoU",
    "pixel_accuracy": "pixel accuracy",
}


def answer(
    space: SearchSpace,
    records: Sequence[TrialRecord],
    best: TrialRecord | None,
    base: TrialRecord | None,
    summary: Mapping[str, Any],
) -> str:
    """The best trial and its difference to the base configuration, in one or two sentences."""
    metric = METRIC_LABELS.get(summary["metric"], summary["metric"])
    if best is None or best.value is None:
        return _no_result(records)
    if base is not None and best.number == base.number:
        others = [record for record in records if has_value(record) and record.number != base.number]
        if not others:
            return (
                f"Only the base configuration ({space.base_name}) was measured: {metric} {score(best.value)}. What "
                "searching gains is not known."
            )
        closest = (min if summary["mode"] == "min" else max)(others, key=lambda record: record.value or 0.0)
        return (
            f"Searching did not beat the base configuration ({space.base_name}): its {metric} of "
            f"{score(best.value)} is the best of {len(others) + 1} trials. The next is trial {closest.number} with "
            f"{score(closest.value)}."
        )
    said = f"Trial {best.number} is the best: {metric} {score(best.value)}"
    with_settings = f" Its settings: {_in_words(space, best, base)}."
    if base is None or not has_value(base) or base.value is None:
        why = "was not tried" if base is None else _why_no_value(base)
        return f"{said}. The base configuration {why}, so what searching gained is not known.{with_settings}"
    gain = best.value - base.value
    name = f"the base configuration {space.base_name}"
    if gain == 0:
        return f"{said}, as with {name}, but its adapter is smaller.{with_settings}"
    # For a loss or a number of clicks, which are not shares, the share of the value counts.
    small = abs(gain) < NOTICEABLE * (abs(base.value) if is_lower_better(summary["metric"]) else 1)
    hardly = ", hardly a difference" if small else ""
    return f"{said} instead of {score(base.value)} with {name} ({change(gain)}{hardly}).{with_settings}"


def held_out_sentence(held_out: Mapping[str, Any] | None) -> str:
    """The best trial on held-out images; without them, a warning that its value is optimistic."""
    if not held_out or "failure" in held_out:
        failed = f"The held-out split {held_out['split']} was not measured: {held_out['failure']}. " if held_out else ""
        return (
            f"{failed}This value is optimistic: it was measured on the validation images, which also chose the epoch "
            "and the trial. Expect a lower quality on other images, the more so the more trials there were."
        )
    metric = METRIC_LABELS.get(held_out["metric"], held_out["metric"])
    number, note = held_out["num_images"], held_out.get("note")
    images = f"the {number} held-out image{'s' * (number != 1)} of {held_out['split']}"
    if held_out.get("best") is None:
        return f"On {images} nothing was measured. {note or ''}".rstrip()
    said = f"On {images}: {metric} {score(held_out['best'])}"
    if held_out.get("base") is not None:
        said += f" instead of {score(held_out['base'])} with the {held_out.get('compared_with', 'base configuration')}"
    if held_out.get("difference") is not None:
        said += f" ({change(held_out['difference'])}"
        low, high = held_out.get("low"), held_out.get("high")
        if low is not None and high is not None:
            excludes = "excludes" if low > 0 or high < 0 else "includes"
            said += f", 95 % interval {change(low)} to {change(high)}, {excludes} zero"
        said += ")"
    return f"{said}. {note or ''}".rstrip()


def vision_sentence(vision: Mapping[str, Any] | None, records: Sequence[TrialRecord]) -> str:
    """How often images went through the vision trunk, and how often the cache had its output."""
    if not vision:
        return ""
    said = f"In the whole sweep images went {vision['passes']} times through the vision trunk"
    if vision.get("images"):
        said += f", with {vision['images']} images in the data"
    loaded = sum(record.features_loaded for record in records)
    return f"{said}; {loaded} times its output was in the cache." if loaded else f"{said}."


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, or all of it if another name ends alike."""
    leaves = Counter(name.rpartition(".")[2] for name in names)
    return {name: leaf if leaves[leaf := name.rpartition(".")[2]] == 1 else name for name in names}


def _why_no_value(record: TrialRecord) -> str:
    if record.status == "failed":
        return f"failed ({record.failure})"
    return "has no value" if record.has_ended else "has no value yet"


def _no_result(records: Sequence[TrialRecord]) -> str:
    if not records:
        return "No trial was begun."
    counts = Counter(f"failed: {record.failure}" if record.failure else record.status for record in records)
    said = f"No trial has a value ({', '.join(f'{count} {status}' for status, count in counts.most_common())})."
    reasons = (f" Trial {record.number}: {record.reason}" for record in records if record.reason)
    return said + next(reasons, "")


def _in_words(space: SearchSpace, best: TrialRecord, base: TrialRecord | None) -> str:
    short = short_names(list(space.parameters))
    parts = []
    for name, parameter in space.parameters.items():
        if name not in best.values or isinstance(parameter, Tied):
            continue
        same = base is not None and base.values.get(name) == best.values[name]
        parts.append(f"{short[name]} {space.label(name, best.values[name])}{' (as in the base)' if same else ''}")
    return ", ".join(parts)
