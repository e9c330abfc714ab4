"""`ClickMetrics`: all numbers of clicks on one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam3lora.data.coco import CocoIndex
from sam3lora.data.fault_report import SplitFault, fault_lines
from sam3lora.engine.clicks.interaction import SeedKind
from sam3lora.evaluation.clicks.meter import LEAST_SHARE, ClickMeter, clicks_saved
from sam3lora.evaluation.clicks.seeds import SEED_IOU
from sam3lora.evaluation.clicks.split_clicks import SplitClicks
from sam3lora.evaluation.metrics.bootstrap import Interval, ValueInterval

NUM_RESAMPLES = 1000
TASK = "clicks"
PER_CATEGORY = ("noc_", "mean_iou_")
"""Beginnings of the measures that are given of each category."""


@dataclass(frozen=True)
class ClickMetrics:
    """Metrics of clicks on a split, None where nothing can be measured (`notes` say why).

    Attributes:
        label: Name of the model.
        num_images: Images of the split; `num_images_with_objects` of them are measured.
        num_too_small, num_without_mask, num_crowds: Annotations that are not clicked on.
        alone: Measures of clicks from nothing, as `ClickMeter` names them, with their intervals over images.
        from_text: The same from what the prompt found; None if no prompt was asked.
        saved: Clicks that an object takes less from there, by noc_80 and so on.
        num_found: Objects that the prompt found.
        per_category: Category name -> num_objects and the measures of clicks from nothing; with a prompt also
            num_found, and the others behind `from_text_`.
        skipped_images: Those that could not be read, which have no part in any number.
        clicks, index: For charts and pictures: what all was computed from, and the images.
    """

    label: str
    num_images: int
    num_images_with_objects: int
    num_objects: int
    num_too_small: int
    num_without_mask: int
    num_crowds: int
    alone: dict[str, ValueInterval]
    start_from: SeedKind | None
    from_text: dict[str, ValueInterval] | None
    saved: dict[str, Interval]
    num_found: int
    per_category: dict[str, dict[str, float | int | None]]
    settings: dict[str, Any]
    notes: list[str]
    clicks: SplitClicks = field(repr=False)
    index: CocoIndex = field(repr=False)
    seconds: float = 0.0
    faults: Sequence[SplitFault] = ()
    skipped_images: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON values."""
        values: dict[str, Any] = {
            "label": self.label,
            "task": TASK,
            "num_images": self.num_images,
            "num_images_with_objects": self.num_images_with_objects,
            "num_objects": self.num_objects,
            "num_too_small": self.num_too_small,
            "num_without_mask": self.num_without_mask,
            "num_crowds": self.num_crowds,
            **_values(self.alone),
            "intervals": _ends(self.alone),
        }
        if self.from_text is not None:
            values |= {
                "from_text": {
                    "start_from": self.start_from,
                    "num_found": self.num_found,
                    **_values(self.from_text),
                    "intervals": _ends(self.from_text),
                },
                "clicks_saved": {name: vars(one) for name, one in self.saved.items()},
            }
        return values | {
            "per_category": self.per_category,
            "settings": self.settings,
            "seconds": self.seconds,
            "skipped_images": list(self.skipped_images),
            "notes": [*fault_lines(self.faults), *self.notes],
        }


def measure_clicks(
    clicks: SplitClicks,
    index: CocoIndex,
    categories: Sequence[str],
    *,
    label: str,
    start_from: SeedKind | None,
    settings: Mapping[str, Any],
    seconds: float = 0.0,
    faults: Sequence[SplitFault] = (),
    skipped_images: Sequence[Mapping[str, Any]] = (),
    num_resamples: int = NUM_RESAMPLES,
) -> ClickMetrics:
    """Compute all metrics from the runs of all objects; the rest is stored.

    Args:
        start_from: None if no prompt was asked, and `clicks.from_text` is empty.
    """
    alone, from_text = clicks.alone, None if start_from is None else clicks.from_text
    return ClickMetrics(
        label=label,
        num_images=len(index),
        num_images_with_objects=len(alone.image_ids),
        num_objects=len(alone.objects),
        num_too_small=alone.num_left_out,
        num_without_mask=clicks.counts["without_mask"],
        num_crowds=clicks.counts["crowds"],
        alone=alone.intervals(num_resamples=num_resamples),
        start_from=start_from,
        from_text=None if from_text is None else from_text.intervals(num_resamples=num_resamples),
        saved={} if from_text is None else clicks_saved(alone, from_text, num_resamples=num_resamples),
        num_found=sum(one.is_found for one in clicks.facts.values()),
        per_category={name: _of_category(clicks, name, from_text) for name in categories},
        settings=dict(settings),
        notes=_notes(clicks, is_prompted=start_from is not None),
        clicks=clicks,
        index=index,
        seconds=seconds,
        faults=faults,
        skipped_images=skipped_images,
    )


def _of_category(clicks: SplitClicks, name: str, from_text: ClickMeter | None) -> dict[str, float | int | None]:
    objects = {one for one, fact in clicks.facts.items() if fact.category == name}
    found: dict[str, float | int | None] = {"num_objects": len(objects)}
    found |= _reported(clicks.alone.only(objects))
    if from_text is not None:
        found["num_found"] = sum(clicks.facts[one].is_found for one in objects)
        found |= {f"from_text_{measure}": value for measure, value in _reported(from_text.only(objects)).items()}
    return found


def _reported(meter: ClickMeter) -> dict[str, float | None]:
    return {name: value for name, value in meter.values().items() if name.startswith(PER_CATEGORY)}


def _notes(clicks: SplitClicks, *, is_prompted: bool) -> list[str]:
    alone, counts = clicks.alone, clicks.counts
    notes = []
    if not alone.objects:
        notes.append("no image has an object that can be clicked on, so nothing is measured")
    if alone.num_left_out:
        notes.append(f"objects left out: {alone.num_left_out} with less than {LEAST_SHARE:g} of their image's pixels")
    if counts["without_mask"]:
        notes.append(f"objects left out: {counts['without_mask']} without a mask")
    if counts["crowds"]:
        notes.append(f"neither right nor wrong: pixels of crowd regions ({counts['crowds']})")
    if is_prompted and alone.objects:
        found = sum(one.is_found for one in clicks.facts.values())
        notes.append(
            f"the prompts found {found} of {len(alone.objects)} objects with a mask IoU of {SEED_IOU:g} or more; "
            "clicks on the others start from nothing"
        )
    return notes


def _values(measures: Mapping[str, ValueInterval]) -> dict[str, float | None]:
    return {name: one.value for name, one in measures.items()}


def _ends(measures: Mapping[str, ValueInterval]) -> dict[str, dict[str, float | None]]:
    return {name: {"low": one.low, "high": one.high} for name, one in measures.items() if one.low is not None}
