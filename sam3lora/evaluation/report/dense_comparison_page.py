"""The report of `compare` for dense models: whether they are better than the first, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from sam3lora.evaluation.dense.comparison import most_different
from sam3lora.evaluation.dense.measure import DenseMetrics
from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.report.charts import interval_chart
from sam3lora.evaluation.report.comparison_page import Cell
from sam3lora.evaluation.report.dense_glossary import DENSE_MEASURES
from sam3lora.evaluation.report.dense_pictures import DenseGallery
from sam3lora.evaluation.report.html_page import change, fault_box, render_page, score, setting_rows
from sam3lora.evaluation.report.pictures import Picture

Intervals = Mapping[str, Mapping[str, Interval]]
"""Label -> measure, or iou/CLASS -> that model minus the first."""

DECIDING = "mean_iou_foreground"


def render_dense_comparison(
    first: DenseMetrics, others: Sequence[DenseMetrics], intervals: Intervals, *, num_pictures: int = 10
) -> str:
    """HTML that refers to no other file; the pictures are the images on which the models differ most."""
    labels = [one.label for one in (first, *others)]
    return render_page(
        "dense_comparison.html.j2",
        title=f"{', '.join(labels[1:])} against {labels[0]}",
        first=first,
        others=others,
        labels=labels,
        sentences=[sentence(first, other, intervals[other.label].get(DECIDING)) for other in others],
        measures=[
            (measure, first.values[measure.name], [_cell(first, other, measure.name, intervals) for other in others])
            for measure in DENSE_MEASURES
            if measure.name in first.values
        ],
        classes=[
            (name, entry, [_class_cell(first, other, name, intervals) for other in others])
            for name, entry in first.per_class.items()
        ],
        charts=[chart for other in others if (chart := _chart(first, other, intervals[other.label]))],
        pictures=_pictures(first, others, num_pictures),
        settings=setting_rows([one.settings for one in (first, *others)]),
        notes=list(dict.fromkeys(note for one in (first, *others) for note in one.notes)),
        fault_box=fault_box(first.faults),
    )


def sentence(first: DenseMetrics, other: DenseMetrics, interval: Interval | None) -> str:
    """Whether the other model is better than the first, and whether other images could have shown the opposite."""
    before, after = first.values[DECIDING], other.values[DECIDING]
    if before is None or after is None:
        return f"{other.label} cannot be compared: neither labels nor predictions of these images show a class."
    said = f"mean IoU without the background {score(after)} instead of {score(before)} ({change(after - before)}"
    if interval is None or interval.low is None:
        return f"{other.label} reaches {said}); how certain that is could not be computed."
    said += f", 95 % interval {change(interval.low)} to {change(interval.high)})"
    if not interval.excludes_zero:
        return f"No clear difference between {other.label} and {first.label}: {said}. The interval includes zero."
    better = "better" if interval.low > 0 else "worse"
    return f"{other.label} is {better} than {first.label}: {said}. The interval excludes zero."


def _cell(first: DenseMetrics, other: DenseMetrics, name: str, intervals: Intervals) -> Cell:
    return _difference(first.values[name], other.values[name], intervals[other.label].get(name))


def _class_cell(first: DenseMetrics, other: DenseMetrics, name: str, intervals: Intervals) -> Cell:
    before, after = first.per_class[name].iou, other.per_class[name].iou
    return _difference(before, after, intervals[other.label].get(f"iou/{name}"))


def _difference(before: float | None, after: float | None, interval: Interval | None) -> Cell:
    return Cell(after, None if before is None or after is None else after - before, interval)


def _chart(first: DenseMetrics, other: DenseMetrics, intervals: Mapping[str, Interval]) -> Markup | None:
    names = {measure.name: measure.label for measure in DENSE_MEASURES}
    known = {names[name]: one for name, one in intervals.items() if name in names and one.low is not None}
    if not known:
        return None
    what = f"{other.label} minus {first.label}"
    return interval_chart(known, description=f"{what} with 95 % intervals", x_label=what)


def _pictures(first: DenseMetrics, others: Sequence[DenseMetrics], count: int) -> list[Picture]:
    results = [first, *others]
    if any(one.predictions is None for one in results):
        return []
    rows = most_different(first, others, count)
    gallery = DenseGallery(results, len(rows))
    return [gallery.picture(first.meter.image_ids[row]) for row in rows]
