"""The report of `validate --clicks`: one HTML file that a person can read, print and send."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.clicks.meter import ClickMeter
from sam3lora.evaluation.metrics.bootstrap import Interval, ValueInterval
from sam3lora.evaluation.report.charts import Line, histogram_chart, line_chart
from sam3lora.evaluation.report.click_glossary import CLICK_MEASURES, DECIDING, DECIDING_PERCENT, is_count
from sam3lora.evaluation.report.click_pictures import LEGEND, ClickGallery
from sam3lora.evaluation.report.glossary import Measure
from sam3lora.evaluation.report.html_page import facts_of_run, render_page, share
from sam3lora.evaluation.report.pictures import Picture
from sam3lora.evaluation.report.worst_and_best import Chosen

ALONE, FROM_TEXT = "clicks alone", "after a prompt"


@dataclass(frozen=True)
class Row:
    """A measure of clicks alone and after a prompt, and the clicks that the prompt saves, where it is one of clicks."""

    measure: Measure
    alone: ValueInterval
    from_text: ValueInterval | None
    saved: Interval | None

    @property
    def decimals(self) -> int:
        return 0 if is_count(self.measure) else 3


def render_click_report(metrics: ClickMetrics, *, title: str | None = None, num_pictures: int = 4) -> str:
    """Render the report.

    Args:
        title: Heading; None names the model.
        num_pictures: Pictures of the worst objects, as many of the median ones, and as many of the best.

    Returns:
        HTML that refers to no other file.
    """
    return render_page(
        "click_report.html.j2",
        title=title or f"Clicks with {metrics.label}",
        summary=summary_sentences(metrics),
        metrics=metrics,
        rows=_rows(metrics),
        categories={name: entry for name, entry in metrics.per_category.items() if entry["num_objects"]},
        columns=_category_columns(metrics),
        charts=_charts(metrics) if metrics.num_objects else [],
        pictures=_pictures(metrics, num_pictures),
        legend=LEGEND,
        **facts_of_run(metrics),
    )


def summary_sentences(metrics: ClickMetrics) -> str:
    """How many clicks an object takes, how many never get there, and what a prompt before saves."""
    clicks = metrics.alone[DECIDING]
    if clicks.value is None:
        return "These images have no object that can be clicked on."
    said = f"With {metrics.label} an object takes {clicks.value:.2f} clicks to an IoU of 0.{DECIDING_PERCENT}"
    if clicks.low is not None and clicks.high is not None:
        said += f" (95 % interval {clicks.low:.2f} to {clicks.high:.2f})"
    never = int(metrics.clicks.alone.has_failed(DECIDING_PERCENT).sum())
    said += f"; {share(never, metrics.num_objects, 'objects')} never get there."
    saved = metrics.saved.get(DECIDING)
    if saved is not None and saved.difference is not None:
        what = "saves" if saved.difference >= 0 else "costs"
        said += f" Starting from what the prompt found {what} {abs(saved.difference):.2f} clicks an object"
        if saved.low is not None:
            sure = "excludes" if saved.excludes_zero else "includes"
            said += f" (95 % interval {saved.low:+.2f} to {saved.high:+.2f}, which {sure} zero)"
        said += "."
    return said


def hardness(meter: ClickMeter) -> np.ndarray:
    """For each object (N,) its mean IoU over all numbers of clicks from 1 on: low where many clicks help little."""
    return np.asarray(meter.ious()[:, 1:].mean(axis=1))


def _rows(metrics: ClickMetrics) -> list[Row]:
    others = metrics.from_text or {}
    return [
        Row(measure, metrics.alone[measure.name], others.get(measure.name), metrics.saved.get(measure.name))
        for measure in CLICK_MEASURES
        if measure.name in metrics.alone
    ]


def _category_columns(metrics: ClickMetrics) -> list[tuple[str, str]]:
    """(name in `per_category`, heading)."""
    known = next(iter(metrics.per_category.values()), {})
    columns = [(one.name, one.label) for one in CLICK_MEASURES if one.name in (DECIDING, "mean_iou_1", "mean_iou_3")]
    if metrics.from_text is not None:
        columns += [
            ("num_found", "found by the prompt"),
            (f"from_text_{DECIDING}", f"clicks to IoU 0.{DECIDING_PERCENT} after it"),
        ]
    return [column for column in columns if column[0] in known]


def _meters(metrics: ClickMetrics) -> dict[str, ClickMeter]:
    meters = {ALONE: metrics.clicks.alone}
    return meters if metrics.from_text is None else meters | {FROM_TEXT: metrics.clicks.from_text}


def _charts(metrics: ClickMetrics) -> list[tuple[str, Markup, str]]:
    """(heading, chart, caption)."""
    meters, most = _meters(metrics), metrics.clicks.alone.max_clicks
    lines = [
        Line(name, list(range(most + 1)), [float(iou) for iou in meter.ious().mean(axis=0)])
        for name, meter in meters.items()
    ]
    curve = line_chart(
        lines,
        description=f"{metrics.label}: mean IoU by number of clicks",
        x_label="clicks",
        y_label="mean IoU",
        x_high=most,
    )
    never = most + 1
    counts = {
        name: np.bincount(
            np.where(meter.has_failed(DECIDING_PERCENT), never, meter.num_clicks(DECIDING_PERCENT)), minlength=never + 1
        ).tolist()
        for name, meter in meters.items()
    }
    histogram = histogram_chart(
        [number - 0.5 for number in range(never + 2)],
        counts,
        description=f"{metrics.label}: objects by clicks to IoU 0.{DECIDING_PERCENT}",
        x_label=f"clicks to IoU 0.{DECIDING_PERCENT} ({never}: never)",
    )
    return [
        ("Mean IoU over clicks", curve, "At 0 clicks: nothing, or what the prompt found."),
        (
            f"Clicks to IoU 0.{DECIDING_PERCENT}",
            histogram,
            "Share of the objects. At 0: good enough as the prompt found them.",
        ),
    ]


def _pictures(metrics: ClickMetrics, count: int) -> list[tuple[str, list[Picture]]]:
    objects = metrics.clicks.alone.objects
    chosen = Chosen.of(hardness(metrics.clicks.alone), count)
    gallery = ClickGallery(metrics, chosen.number)
    return chosen.sections("objects", lambda row: gallery.picture(objects[row]))
