"""The metrics of a report in the order of its tables, in words that need no paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A field of `SplitMetrics`, its name in tables, and what it means."""

    name: str
    label: str
    meaning: str
    lower_is_better: bool = False


MEASURES = (
    Measure(
        "map",
        "mAP",
        "Overall quality of the masks. Mean over categories of average precision, which asks for every object, well "
        "outlined, before any wrong detection; averaged over required overlaps (IoU) from 0.50 to 0.95. No threshold.",
    ),
    Measure("map_50", "mAP at IoU 0.50", "The same when a rough outline is enough."),
    Measure("map_75", "mAP at IoU 0.75", "The same when the outline has to fit well."),
    Measure("map_small", "mAP, small objects", "Masks below 32 × 32 pixels."),
    Measure("map_medium", "mAP, medium objects", "Masks up to 96 × 96 pixels."),
    Measure("map_large", "mAP, large objects", "Masks above 96 × 96 pixels."),
    Measure("mar_100", "recall", "Share of the objects found by the best 100 detections, averaged over overlaps."),
    Measure("bbox_map", "box mAP", "mAP of the boxes instead of the masks."),
    Measure("bbox_map_50", "box mAP at IoU 0.50", "The same when a rough box is enough."),
    Measure(
        "cgf1",
        "cgF1",
        "SAM 3's own measure at score 0.50: the quality of what was found (positive micro F1) times the sense of what "
        "is there at all (IL_MCC).",
    ),
    Measure("cgf1_50", "cgF1 at IoU 0.50", "The same when a rough outline is enough."),
    Measure("cgf1_75", "cgF1 at IoU 0.75", "The same when the outline has to fit well."),
    Measure(
        "positive_micro_f1",
        "positive micro F1",
        "Balance of objects found and detections right, at score 0.50, where the prompt names something in the image.",
    ),
    Measure(
        "il_mcc",
        "IL_MCC",
        "Whether the model answers exactly when the thing is in the image, at score 0.50: 1 always, 0 as by chance.",
    ),
    Measure(
        "off_prompt_fpr",
        "false alarms",
        "Share of the questions for something that is not in the image which got an answer. Lower is better.",
        lower_is_better=True,
    ),
    Measure("presence_accuracy", "presence accuracy", "How often the model is right about what is in the image."),
    Measure("presence_accuracy_absent", "presence accuracy, absent", "The same where the thing is absent."),
    Measure("num_detections", "detections", "With a score at or above the threshold."),
    Measure("num_predictions", "detections at any score", "What mAP is computed from."),
    Measure(
        "num_predictions_before_nms",
        "the same with duplicates",
        "Before overlapping detections were suppressed or merged.",
    ),
)
