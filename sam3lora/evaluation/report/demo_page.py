"""The demo's report: one HTML file with everything in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam3lora.evaluation.metrics.comparison import NOTICEABLE, Comparison
from sam3lora.evaluation.report.html_page import render_page, setting_rows
from sam3lora.evaluation.report.pictures import Picture


@dataclass(frozen=True)
class Row:
    """One line of the comparison; values in [0, 1] or None."""

    label: str
    base: float | None
    adapter: float | None

    @property
    def change(self) -> float | None:
        return None if self.base is None or self.adapter is None else self.adapter - self.base


def comparison_rows(comparison: Comparison) -> list[Row]:
    """The numbers that say whether the adapter is better, then mAP by category."""
    base, adapter = comparison.base, comparison.adapters[0]
    rows = [
        Row("mAP", base.map, adapter.map),
        Row("mAP at IoU 0.50", base.map_50, adapter.map_50),
        Row("mAP at IoU 0.75", base.map_75, adapter.map_75),
        Row("presence accuracy", base.presence_accuracy, adapter.presence_accuracy),
        Row("cgF1", base.cgf1, adapter.cgf1),
        Row("fires on absent prompts", base.off_prompt_fpr, adapter.off_prompt_fpr),
    ]
    for name, entry in base.per_category.items():
        rows.append(Row(f"mAP {name} ({entry.num_ground_truth})", entry.map, adapter.per_category[name].map))
    return rows


def verdict(comparison: Comparison) -> str:
    """What came of it, in two sentences at most."""
    base, adapter = comparison.base, comparison.adapters[0]
    if base.map is None or adapter.map is None:
        return "The validation images hold no object, so nothing could be measured."
    numbers = f"mAP {base.map:.3f} without, {adapter.map:.3f} with the adapter, on images it never saw."
    interval = comparison.intervals[adapter.label]["map"]
    if interval.low is None or interval.high is None:
        return f"Too few images to tell chance from progress: {numbers}"
    sure = f" The difference lies between {interval.low:+.3f} and {interval.high:+.3f} (95 % interval over images)."
    if interval.low > 0 and adapter.map - base.map >= NOTICEABLE:
        return f"The adapter finds objects that the base model does not know: {numbers}{sure}"
    return f"The adapter did not clearly beat the base model in this run: {numbers}{sure}"


def render_demo_report(
    comparison: Comparison,
    *,
    history: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture],
    facts: Mapping[str, str],
    settings: Mapping[str, str],
    next_steps: Sequence[tuple[str, str]],
    threshold: float,
) -> str:
    """Write the page.

    Args:
        comparison: Base and adapter on the same images.
        history: One mapping an epoch with `epoch`, `train_loss`, `valid_loss`.
        pictures: Those of `comparison_pictures`.
        facts: Headline label -> value, beside the metrics.
        settings: Name -> value, for the table at the end.
        next_steps: Command and what it does.
        threshold: Lowest score drawn in the pictures.

    Returns:
        HTML without any reference outside itself.
    """
    base, adapter = comparison.base, comparison.adapters[0]
    return render_page(
        "demo_report.html.j2",
        title="sam3lora demo",
        labels=[],
        verdict=verdict(comparison),
        rows=comparison_rows(comparison),
        num_images=base.num_images,
        num_objects=base.num_ground_truth,
        notes=list(dict.fromkeys([*base.notes, *adapter.notes])),
        chart=loss_chart(history),
        pictures=pictures,
        facts=facts,
        settings=setting_rows([settings]),
        next_steps=next_steps,
        threshold=threshold,
    )


def loss_chart(history: Sequence[Mapping[str, Any]], width: int = 640, height: int = 260) -> dict[str, Any] | None:
    """Coordinates of the loss curves, for an SVG of this size; None without two epochs that have a loss."""
    series = {
        name: [(float(line["epoch"]), float(line[key])) for line in history if line.get(key) is not None]
        for name, key in (("training", "train_loss"), ("validation", "valid_loss"))
    }
    values = [value for points in series.values() for _, value in points]
    epochs = sorted({epoch for points in series.values() for epoch, _ in points})
    if len(epochs) < 2:
        return None
    step = _round_step((max(values) - min(values)) or abs(max(values)) or 1.0)
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    high = high if high > low else low + step
    left, right, top, bottom = 44, width - 12, 12, height - 34

    def x(epoch: float) -> float:
        return round(left + (right - left) * (epoch - epochs[0]) / (epochs[-1] - epochs[0]), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    ticks = [low + number * step for number in range(round((high - low) / step) + 1)]
    every = -(-len(epochs) // 12)
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "bottom": bottom,
        "y_ticks": [(y(tick), f"{tick:g}" if abs(tick) >= step / 2 else "0") for tick in ticks],
        "x_ticks": [(x(epoch), f"{epoch:g}") for epoch in epochs[::every]],
        "series": [
            (name, [(x(epoch), y(value)) for epoch, value in points]) for name, points in series.items() if points
        ],
    }


def _round_step(extent: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides the extent into about four."""
    raw = extent / 4
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
