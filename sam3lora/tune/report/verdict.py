"""What a sweep's report says in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sam3lora.evaluation.report.html_page import change, score
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.space.parameters import Tied
from sam3lora.tune.space.search_space import SearchSpace

NOTICEABLE = 0.01  # mAP or cgF1; of a loss the share: less is hardly a difference
METRIC_LABELS = {"valid_loss": "validation loss", "map": "mAP", "cgf1": "cgF1"}


def answer(
    space: SearchSpace,
    records: Sequence[TrialRecord],
    best: TrialRecord | None,
    base: TrialRecord | None,
    summary: Mapping[str, Any],
) -> str:
    """What came out, in one or two sentences: no louder than the difference to the base configuration."""
    metric = METRIC_LABELS.get(summary["metric"], summary["metric"])
    if best is None or best.value is None:
        return _no_result(records)
    if base is not None and best.number == base.number:
        others = [r for r in records if r.value is not None and r.status != "failed" and r.number != base.number]
        if not others:
            return (
                f"Only the base configuration ({space.base_name}) was measured: {metric} {score(best.value)}. What "
                "searching gains is not known."
            )
        closest = (min if summary["mode"] == "min" else max)(others, key=lambda record: record.value or 0.0)
        return (
            f"Searching did not beat the base configuration ({space.base_name}){_stopped(base)}: its {metric} of "
            f"{score(best.value)} is the best of {len(others) + 1} trials. The next is trial {closest.number} with "
            f"{score(closest.value)}."
        )
    said = f"Trial {best.number} is the best: {metric} {score(best.value)}"
    with_settings = f" Its settings: {_in_words(space, best, base)}."
    if base is None:
        return f"{said}. The base configuration was not tried, so what searching gained is not known.{with_settings}"
    if base.value is None or base.status == "failed":
        without = "has no value" if base.has_ended else "has no value yet"
        why = f"failed ({base.failure})" if base.status == "failed" else without
        return f"{said}. The base configuration {why}, so what searching gained is not known.{with_settings}"
    gain = best.value - base.value
    name = f"the base configuration {space.base_name}{_stopped(base)}"
    if gain == 0:
        return f"{said}, as with {name}, but its adapter is smaller.{with_settings}"
    small = abs(gain) < NOTICEABLE * (abs(base.value) if summary["metric"] == "valid_loss" else 1)
    hardly = ", hardly a difference" if small else ""
    return f"{said} instead of {score(base.value)} with {name} ({change(gain)}{hardly}).{with_settings}"


def held_out_sentence(held_out: Mapping[str, Any] | None) -> str:
    """The best trial on images that had no part in the choice; without them, what the value is worth."""
    if not held_out or held_out.get("best") is None:
        return (
            "This value is optimistic: the validation images that it was measured on also chose the epoch and the "
            "trial. Expect worse on other images, the more so the more trials there were."
        )
    metric = METRIC_LABELS.get(held_out["metric"], held_out["metric"])
    note = held_out.get("note")
    images = "held-out images" if note else f"the {held_out['num_images']} held-out images of {held_out['split']}"
    said = f"On {images}: {metric} {score(held_out['best'])}"
    if held_out.get("base") is not None:
        said += f" instead of {score(held_out['base'])} with the {held_out.get('compared_with', 'base configuration')}"
    if held_out.get("difference") is not None and held_out.get("low") is not None:
        low, high = held_out["low"], held_out["high"]
        excludes = "excludes" if low > 0 or high < 0 else "includes"
        said += f" ({change(held_out['difference'])}, 95 % interval {change(low)} to {change(high)}, {excludes} zero)"
    return f"{said}. {note}" if note else f"{said}."


def vision_sentence(vision: Mapping[str, Any] | None, records: Sequence[TrialRecord]) -> str:
    """How often images went through the vision trunk, and how often that was spared."""
    if not vision:
        return ""
    said = f"In the whole sweep images went {vision['passes']} times through the vision trunk"
    if vision.get("images"):
        said += f", with {vision['images']} images in the data"
    loaded = sum(record.features_loaded for record in records)
    return f"{said}; {loaded} times its output was in the cache." if loaded else f"{said}."


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted name's last part, where no other has the same."""
    leaves = Counter(name.rpartition(".")[2] for name in names)
    return {name: leaf if leaves[leaf := name.rpartition(".")[2]] == 1 else name for name in names}


def _stopped(base: TrialRecord) -> str:
    return f", which was stopped early after epoch {base.epochs}" if base.status == "stopped" else ""


def _no_result(records: Sequence[TrialRecord]) -> str:
    failed = [record for record in records if record.status == "failed"]
    if not records:
        return "No trial was begun."
    begun = f"{len(records)} {'was' if len(records) == 1 else 'were'} begun"
    if not failed:
        if all(record.has_ended for record in records):
            return f"No trial has a value: {begun}, and nothing was measured."
        return f"No trial has a value yet; {begun}."
    kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(r.failure for r in failed).most_common())
    reason = f" Trial {failed[0].number}: {failed[0].reason}" if failed[0].reason else ""
    if len(records) == 1:
        return f"The only trial failed: {failed[0].failure}.{reason}"
    how_many = f"All {len(failed)} trials" if len(failed) == len(records) else f"No trial has a value; {len(failed)}"
    return f"{how_many} failed: {kinds}.{reason}"


def _in_words(space: SearchSpace, best: TrialRecord, base: TrialRecord | None) -> str:
    short = short_names(list(space.parameters))
    parts = []
    for name, parameter in space.parameters.items():
        if name not in best.values or isinstance(parameter, Tied):
            continue
        same = base is not None and base.values.get(name) == best.values[name]
        parts.append(f"{short[name]} {space.label(name, best.values[name])}{' (as in the base)' if same else ''}")
    return ", ".join(parts)
