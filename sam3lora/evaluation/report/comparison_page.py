"""The report of `compare`: whether adapters are better than their base, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.metrics.comparison import NOTICEABLE
from sam3lora.evaluation.metrics.measure import CategoryMetrics, SplitMetrics
from sam3lora.evaluation.metrics.ranking import most_different_images
from sam3lora.evaluation.report.charts import interval_chart
from sam3lora.evaluation.report.glossary import MEASURES, Measure, measures_of
from sam3lora.evaluation.report.html_page import change, fault_box, render_page, score, setting_rows
from sam3lora.evaluation.report.pictures import Gallery, Picture, threshold_texts

Intervals = Mapping[str, Mapping[str, Interval]]
"""Adapter label -> field of `SplitMetrics` -> adapter minus base."""

FEW_IMAGES = 30  # a bootstrap interval of fewer images is mostly too narrow


@dataclass(frozen=True)
class Cell:
    """An adapter's value, its difference to the base, and the interval of the difference if there is one."""

    value: float | None
    difference: float | None
    interval: Interval | None


@dataclass(frozen=True)
class CategoryRow:
    """A category's metrics with the base and with each adapter, and each adapter's difference in mAP."""

    name: str
    base: CategoryMetrics
    adapters: list[tuple[CategoryMetrics, float | None]]


def render_comparison_report(
    base: SplitMetrics,
    adapters: Sequence[SplitMetrics],
    intervals: Intervals,
    *,
    title: str | None = None,
    pictures_per_category: int = 2,
    max_pictures: int = 80,
) -> str:
    """Render the report.

    Args:
        adapters: Metrics of at least one adapter on the same split with the same settings.
        title: Heading; None names the models.
        pictures_per_category: Images shown for each category; one if `max_pictures` would be exceeded.
        max_pictures: Greatest number of images; the categories with the most objects come first.

    Returns:
        HTML that refers to no other file.
    """
    results = [base, *adapters]
    labels = [result.label for result in results]
    pictures, without = _category_pictures(results, pictures_per_category, max_pictures)
    return render_page(
        "comparison_report.html.j2",
        title=title or f"{', '.join(labels[1:])} against the base",
        thresholds=threshold_texts(results),
        base=base,
        adapters=adapters,
        labels=labels,
        sentences=[comparison_sentence(base, adapter, intervals.get(adapter.label, {})) for adapter in adapters],
        category_sentences=[category_sentence(base, adapter) for adapter in adapters],
        measures=[(m, [_cell(base, adapter, m, intervals) for adapter in adapters]) for m in measures_of(results)],
        charts=[(adapter.label, _interval_chart(adapter.label, intervals)) for adapter in adapters],
        categories=_category_rows(base, adapters),
        pictures=pictures,
        without_picture=without,
        settings=setting_rows([result.settings for result in results]),
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
        fault_box=fault_box(base.faults),
    )


def comparison_sentence(base: SplitMetrics, adapter: SplitMetrics, intervals: Mapping[str, Interval]) -> str:
    """Whether the adapter is better by mAP, and whether other images could have shown the opposite."""
    if base.map is None or adapter.map is None:
        return f"{adapter.label} cannot be compared: these images hold no object to find."
    said = f"mAP {score(adapter.map)} instead of {score(base.map)} ({change(adapter.map - base.map)}"
    interval = intervals.get("map")
    if interval is None or interval.low is None or interval.high is None:
        said = f"{adapter.label} reaches {said}); how certain that is could not be computed."
    else:
        said += f", 95 % interval {change(interval.low)} to {change(interval.high)})"
        if interval.excludes_zero:
            hardly = "hardly " if abs(adapter.map - base.map) < NOTICEABLE else ""
            better = hardly + ("better" if interval.low > 0 else "worse")
            said = (
                f"{adapter.label} is {better} than the base model: {said}. The interval excludes zero: the choice of "
            )
            said += "images does not explain the difference."
        else:
            said = f"No clear difference between {adapter.label} and the base model: {said}. The interval includes "
            said += "zero: on other images of the same kind the sign could change."
    if base.num_images < FEW_IMAGES:
        said += f" {base.num_images} images are few: the interval is rough."
    return said + _false_alarms(base, adapter, intervals.get("off_prompt_fpr"))


def category_sentence(base: SplitMetrics, adapter: SplitMetrics) -> str:
    """How many categories improved and which became worse; "" with fewer than two to compare."""
    differences = {
        name: _difference(entry.map, adapter.per_category[name].map) for name, entry in base.per_category.items()
    }
    known = {name: value for name, value in differences.items() if value is not None}
    if len(known) < 2:
        return ""
    better = [name for name, value in known.items() if value >= NOTICEABLE]
    worse = sorted((name for name, value in known.items() if value <= -NOTICEABLE), key=known.__getitem__)
    listed = f": {', '.join(worse[:5])}{' ...' if len(worse) > 5 else ''}" if worse else ""
    return (
        f"{adapter.label}: mAP is higher in {len(better)} of {len(known)} categories and lower in {len(worse)}{listed}."
    )


def _false_alarms(base: SplitMetrics, adapter: SplitMetrics, interval: Interval | None) -> str:
    before, after = base.off_prompt_fpr, adapter.off_prompt_fpr
    if before is None or after is None:
        return ""
    said = f" False alarms for prompts absent from the image: {100 * after:.0f} %, the base {100 * before:.0f} %"
    if before == after or interval is None or interval.low is None:
        return f"{said}."
    return f"{said}, {'a clear difference' if interval.excludes_zero else 'a difference that chance could explain'}."


def _cell(base: SplitMetrics, adapter: SplitMetrics, measure: Measure, intervals: Intervals) -> Cell:
    value = getattr(adapter, measure.name)
    difference = _difference(getattr(base, measure.name), value)
    return Cell(value, difference, intervals.get(adapter.label, {}).get(measure.name))


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _interval_chart(label: str, intervals: Intervals) -> Markup | None:
    names = {measure.name: measure.label for measure in MEASURES}
    known = {names[name]: i for name, i in intervals.get(label, {}).items() if name in names and i.low is not None}
    if not known:
        return None
    description = f"{label} minus base with 95 % intervals"
    return interval_chart(known, description=description, x_label=f"{label} minus base")


def _category_rows(base: SplitMetrics, adapters: Sequence[SplitMetrics]) -> list[CategoryRow]:
    rows = [
        CategoryRow(
            name,
            entry,
            [(a.per_category[name], _difference(entry.map, a.per_category[name].map)) for a in adapters],
        )
        for name, entry in base.per_category.items()
    ]
    return sorted(rows, key=lambda row: -row.base.num_ground_truth)


def _category_pictures(
    results: Sequence[SplitMetrics], per_category: int, max_pictures: int
) -> tuple[list[tuple[str, list[Picture]]], list[str]]:
    """(category, its pictures) by descending number of objects, and the names of categories without pictures."""
    base = results[0]
    if base.split_dir is None:
        return [], []
    columns = {category.name: column for column, category in enumerate(base.truth.categories)}
    names = sorted(columns, key=lambda name: -base.per_category[name].num_ground_truth)
    per_category = per_category if len(names) * per_category <= max_pictures else 1
    gallery = Gallery(results, (1 + len(results)) * min(max_pictures, len(names) * per_category))
    chosen = {name: most_different_images(columns[name], gallery.counts, per_category) for name in names}
    shown = [name for name in names if chosen[name]][:max_pictures]
    pictures = [(name, [gallery.picture(image, columns[name]) for image in chosen[name]]) for name in shown]
    return pictures, [name for name in names if name not in shown]
