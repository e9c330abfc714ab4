"""The report of `validate` for a dense model: one HTML file that a person can read, print and send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sam3lora.data.label_palette import palette_rgb
from sam3lora.evaluation.dense.measure import DenseClassMetrics, DenseMetrics
from sam3lora.evaluation.metrics.bootstrap import ValueInterval
from sam3lora.evaluation.report.charts import Line, line_chart
from sam3lora.evaluation.report.dense_glossary import DENSE_MEASURES
from sam3lora.evaluation.report.dense_pictures import ERRORS, DenseGallery
from sam3lora.evaluation.report.glossary import Measure
from sam3lora.evaluation.report.html_page import facts_of_run, render_page, score, share
from sam3lora.evaluation.report.pictures import Picture
from sam3lora.evaluation.report.worst_and_best import Chosen
from sam3lora.inference.drawing import Rgb


@dataclass(frozen=True)
class ClassRow:
    """A class in the table: its colour in pictures, its metrics, and its share of the true pixels in percent."""

    name: str
    colour: Rgb
    metrics: DenseClassMetrics
    percent: float
    interval: ValueInterval | None


@dataclass(frozen=True)
class ConfusionCell:
    """A cell of the confusion matrix: percent of the true pixels of its row; `strength` in [0, 1] tints it."""

    text: str
    strength: float
    title: str


def render_dense_report(metrics: DenseMetrics, *, title: str | None = None, num_pictures: int = 4) -> str:
    """Render the report.

    Args:
        title: Heading; None names the model.
        num_pictures: Pictures of the worst images, as many of the median ones, and as many of the best.

    Returns:
        HTML that refers to no other file.
    """
    return render_page(
        "dense_report.html.j2",
        title=title or f"Validation of {metrics.label}",
        summary=summary_sentence(metrics),
        metrics=metrics,
        measures=_measure_rows(metrics),
        classes=_class_rows(metrics),
        confusion=_confusion(metrics),
        charts=_charts(metrics),
        pictures=_pictures(metrics, num_pictures),
        errors=ERRORS,
        **facts_of_run(metrics),
    )


def summary_sentence(metrics: DenseMetrics) -> str:
    """What the model reaches, how certain that is, and what it does in images without any class."""
    name = "mean_iou_foreground"
    value, interval = metrics.values[name], metrics.intervals.get(name)
    if value is None:
        said = "Neither the labels nor the predictions of these images show a class."
    else:
        classes = [label for label, entry in metrics.per_class.items() if entry.iou is not None]
        many = len([label for label in classes if label != "background"]) > 1
        said = f"{metrics.label} reaches {'a mean' if many else 'an'} IoU of {score(value)}"
        if interval is not None and interval.low is not None:
            said += f" (95 % interval {score(interval.low)} to {score(interval.high)})"
        said += ", the background aside" + ("." if many else f" ({next(c for c in classes if c != 'background')}).")
    if metrics.empty_with_foreground is not None:
        alarms = round(metrics.empty_with_foreground * metrics.num_empty_images)
        said += f" It marks something in {share(alarms, metrics.num_empty_images, 'images without any class')}."
    return said


def _pictures(metrics: DenseMetrics, count: int) -> list[tuple[str, list[Picture]]]:
    if metrics.predictions is None:
        return []
    ids = metrics.meter.image_ids
    chosen = Chosen.of(metrics.meter.quality(), count)
    gallery = DenseGallery([metrics], chosen.number)
    return chosen.sections("images", lambda row: gallery.picture(ids[row]))


def _measure_rows(metrics: DenseMetrics) -> list[tuple[Measure, float | None, ValueInterval | None]]:
    return [
        (measure, metrics.values[measure.name], metrics.intervals.get(measure.name))
        for measure in DENSE_MEASURES
        if measure.name in metrics.values
    ]


def _class_rows(metrics: DenseMetrics) -> list[ClassRow]:
    colours = palette_rgb().tolist()
    total = max(1, int(metrics.meter.matrices[0].counts.total().truth.sum()))
    first = 0 if len(metrics.meter.matrices) == 1 else 1
    return [
        ClassRow(name, tuple(colours[value]), entry, 100 * entry.pixels / total, metrics.intervals.get(f"iou/{name}"))
        for value, (name, entry) in enumerate(metrics.per_class.items(), first)
    ]


def _confusion(metrics: DenseMetrics) -> list[tuple[str, list[ConfusionCell]]]:
    """(true class, its cells by predicted class); empty where classes may overlap."""
    if len(metrics.meter.matrices) > 1:
        return []
    (matrix,) = metrics.meter.matrices
    names, rows = matrix.class_names, []
    for name, pixels_N in zip(names, matrix.matrix_NN, strict=True):
        shares_N = pixels_N / max(1, pixels_N.sum())
        cells = [
            ConfusionCell(_percent(part), float(part), f"{name} labelled {other}: {100 * part:.2f} %")
            for other, part in zip(names, shares_N, strict=True)
        ]
        rows.append((name, cells))
    return rows


def _percent(part: float) -> str:
    return "" if part == 0 else "<1" if part < 0.005 else f"{100 * part:.0f}"


def _charts(metrics: DenseMetrics) -> list[tuple[str, Markup, str]]:
    saliency = metrics.meter.saliency
    if saliency is None or not saliency.image_ids:
        return []
    rows = saliency.rows()
    charts = []
    precision_T, recall_T = rows.precision_recall()
    known_T = ~(np.isnan(precision_T) | np.isnan(recall_T))
    if known_T.any():
        chart = line_chart(
            [Line("pixels of all images", _plain(recall_T[known_T]), _plain(precision_T[known_T]))],
            description=f"{metrics.label}: precision by recall of the foreground's pixels",
            x_label="recall: share of the true pixels found",
            y_label="precision: share of right pixels",
        )
        charts.append(
            ("Precision and recall", chart, "Each point is a threshold. The further to the upper right, the better.")
        )
    thresholds = np.arange(rows.f_curves_IT.shape[1]) / (rows.f_curves_IT.shape[1] - 1)
    chart = line_chart(
        [
            Line("F measure", _plain(thresholds), _plain(rows.f_curves_IT.mean(axis=0))),
            Line("E measure", _plain(thresholds), _plain(np.minimum(1, rows.e_curves_IT.mean(axis=0)))),
        ],
        description=f"{metrics.label}: F and E measure by threshold",
        x_label="threshold of the probability",
        y_label="",
        marks={f"in use {metrics.model.threshold:.2f}": metrics.model.threshold},
    )
    charts.append(
        ("F and E measure", chart, "Averaged over images. A flat curve means that the threshold matters little.")
    )
    return charts


def _plain(values: np.ndarray) -> Sequence[float]:
    return [float(value) for value in values]
