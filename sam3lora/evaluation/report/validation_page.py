"""The report of `validate`: one HTML file that a person can read, print and send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from markupsafe import Markup

from sam3lora.evaluation.metrics.cgf1 import SCORE_THRESHOLD
from sam3lora.evaluation.metrics.measure import CategoryMetrics, SplitMetrics
from sam3lora.evaluation.metrics.ranking import MatchCounts, best_images, false_alarms, worst_images
from sam3lora.evaluation.report.charts import Line, histogram_chart, line_chart
from sam3lora.evaluation.report.glossary import measures_of
from sam3lora.evaluation.report.html_page import fault_box, render_page, setting_rows, share
from sam3lora.evaluation.report.pictures import Gallery, Picture, threshold_texts


@dataclass(frozen=True)
class ModelSummary:
    """The parts of the report that concern one model."""

    label: str
    summary: str
    advice: str
    charts: list[tuple[str, Markup, str]]
    categories: list[tuple[str, CategoryMetrics]]


def render_validation_report(
    results: Sequence[SplitMetrics],
    *,
    title: str | None = None,
    num_worst: int = 6,
    num_best: int = 6,
    num_false_alarms: int = 6,
) -> str:
    """Render the report.

    Args:
        results: Metrics of one model, or of several on the same split. The model with the highest mAP decides which
            pictures are shown, since the errors of a model that finds nothing tell little.
        title: Heading; None names the models.
        num_worst, num_best, num_false_alarms: Pictures of images with errors, the worst first, of the best images, and
            of detections for absent prompts.

    Returns:
        HTML that refers to no other file.
    """
    gallery = Gallery(results, (num_worst + num_best) * (1 + len(results)) + num_false_alarms)
    labels = [result.label for result in results]
    chooser = max(range(len(results)), key=lambda model: results[model].map or 0.0)
    totals = gallery.totals[chooser]
    worst, best = worst_images(totals, num_worst), best_images(totals, num_best)
    alarms = false_alarms(results[chooser].matches.table.best_score_IC, results[chooser].is_alarm_IC)
    has_images = results[0].split_dir is not None
    return render_page(
        "validation_report.html.j2",
        title=title or f"Validation of {', '.join(labels)}",
        thresholds=threshold_texts(results),
        results=results,
        labels=labels,
        chooser=labels[chooser],
        measures=measures_of(results),
        sections=[_section(result, gallery, model) for model, result in enumerate(results)],
        precision_recall=_precision_recall(results),
        worst=[gallery.picture(image) for image in worst] if has_images else [],
        best=[gallery.picture(image) for image in best if image not in worst] if has_images else [],
        alarms=[_alarm(gallery, chooser, *pair) for pair in islice(alarms, num_false_alarms)] if has_images else [],
        num_alarms=len(alarms),
        settings=setting_rows([result.settings for result in results]),
        seconds=max(result.seconds for result in results),
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
        fault_box=fault_box(results[0].faults),
    )


def summary_sentence(result: SplitMetrics, total: MatchCounts) -> str:
    """Objects found and missed, and how often the model has a false alarm for an absent prompt, in plain words.

    `total` is the sum over all images at the model's thresholds.
    """
    name = "the base model" if result.label == "base" else result.label
    num_objects, num_detections = total.num_right + total.num_missed, total.num_right + total.num_wrong
    said = f"At a score of {result.threshold_text} or more, "
    if not num_objects:
        plural = "" if num_detections == 1 else "s"
        gives = f"{num_detections} wrong detection{plural}" if num_detections else "no detection, which is right"
        said += f"there is nothing to find in these images and {name} makes {gives}."
    elif not num_detections:
        said += f"{name} finds none of the {num_objects} labelled objects."
    else:
        found, wrong = (
            share(total.num_right, num_objects, "labelled objects"),
            share(total.num_wrong, num_detections, "detections"),
        )
        said += f"{name} finds {found} and misses {total.num_missed}; {wrong} are wrong."
    if result.off_prompt_fpr is None:
        return f"{said} False alarms for absent prompts could not be measured."
    num_alarms = round(result.off_prompt_fpr * result.num_absent_prompts)
    times = share(num_alarms, result.num_absent_prompts, "times")
    return f"{said} For prompts absent from the image it has false alarms {times}."


def threshold_advice(result: SplitMetrics) -> str:
    """Which score threshold would be better, and the cgF1 it would reach; "" if no threshold stands out."""
    sweep = result.sweep
    if sweep is None or sweep.best_threshold is None:
        return ""
    if sweep.best_cgf1 is None:
        return f"A score threshold of {sweep.best_threshold:.2f} is the best that can be found: {sweep.reason}."
    if sweep.best_threshold == SCORE_THRESHOLD or result.cgf1 is None:
        return f"Of the score thresholds tried, {sweep.best_threshold:.2f} gives the best cgF1: {sweep.best_cgf1:.3f}."
    return (
        f"A score threshold of {sweep.best_threshold:.2f} would give cgF1 {sweep.best_cgf1:.3f} instead of "
        f"{result.cgf1:.3f} at {SCORE_THRESHOLD:.2f}. It was chosen on these same images: expect slightly less on "
        "others."
    )


def _section(result: SplitMetrics, gallery: Gallery, model: int) -> ModelSummary:
    charts = []
    if result.sweep is not None:
        charts.append(_threshold_chart(result, result.settings["threshold"]))
    charts += _histograms(result)
    categories = sorted(result.per_category.items(), key=lambda item: -item[1].num_ground_truth)
    return ModelSummary(
        result.label,
        summary_sentence(result, gallery.counts[model].total()),
        threshold_advice(result),
        charts,
        categories,
    )


def _alarm(gallery: Gallery, model: int, image: int, category: int) -> Picture:
    name = gallery.results[model].truth.categories[category].name
    return gallery.detections(image, category, model, f"prompt “{name}” in {gallery.file_name(image)}")


def _precision_recall(results: Sequence[SplitMetrics]) -> Markup | None:
    lines = []
    for result in results:
        for name, curve in (("0.50", result.curves.precision_recall_50), ("0.75", result.curves.precision_recall_75)):
            if curve.mean is not None and (name == "0.50" or len(results) == 1):
                lines.append(Line(f"{result.label}, IoU {name}", curve.recall, curve.mean))
    if not lines:
        return None
    return line_chart(
        lines,
        description="Precision by recall, averaged over the categories",
        x_label="recall: share of the objects found",
        y_label="precision: share of right detections",
    )


def _threshold_chart(result: SplitMetrics, threshold: float) -> tuple[str, Markup, str]:
    sweep = result.sweep
    assert sweep is not None
    name, main = ("cgF1", sweep.cgf1) if result.cgf1 is not None else ("positive micro F1", sweep.positive_micro_f1)
    lines = [(name, main), ("precision", sweep.precision), ("recall", sweep.recall)]
    marks = {f"in use {threshold:.2f}": threshold}
    if sweep.best_threshold is not None:
        marks[f"best {sweep.best_threshold:.2f}"] = sweep.best_threshold
    chart = line_chart(
        [Line(label, sweep.thresholds, values) for label, values in lines],
        description=f"{result.label}: {name}, precision and recall by score threshold",
        x_label="score threshold",
        y_label="",
        marks=marks,
        y_low=min(0.0, *main),
    )
    return "Choice of the threshold", chart, "Averaged over required overlaps (IoU) from 0.50 to 0.95."


def _histograms(result: SplitMetrics) -> list[tuple[str, Markup, str]]:
    detections, best = result.curves.detection_scores, result.curves.best_scores
    found = []
    if any(detections.right + detections.wrong):
        chart = histogram_chart(
            detections.edges,
            {"right": detections.right, "wrong": detections.wrong},
            description=f"{result.label}: scores of right and wrong detections",
            x_label="score",
        )
        found.append(
            (
                "Scores of detections",
                chart,
                "Percent of the right and of the wrong detections, at any score; right means IoU 0.50 with an object.",
            )
        )
    if any(best.right + best.wrong):
        chart = histogram_chart(
            best.edges,
            {"present": best.right, "absent": best.wrong},
            description=f"{result.label}: best score of prompts for present and absent things",
            x_label="best score in the image",
        )
        found.append(
            (
                "Prompts present and absent",
                chart,
                "Percent of the prompts. The further apart the groups, the fewer false alarms.",
            )
        )
    return found
