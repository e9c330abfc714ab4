"""The metrics of a report in the order of its tables, explained in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A field of `SplitMetrics`, its name in tables, and what it means."""

    name: str
    label: str
    meaning: str


MEASURES = (
    Measure(
        "map",
        "mAP",
        "Overall quality of the masks: mean over categories of average precision, which is high if all objects are "
        "found, well outlined, with higher scores than wrong detections. Averaged over required overlaps (IoU) from "
        "0.50 to 0.95. No threshold.",
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
        "SAM 3's own metric at score 0.50: the quality of the detections (positive micro F1) times the ability to tell "
        "whether the thing is in the image at all (IL_MCC).",
    ),
    Measure("cgf1_50", "cgF1 at IoU 0.50", "The same when a rough outline is enough."),
    Measure("cgf1_75", "cgF1 at IoU 0.75", "The same when the outline has to fit well."),
    Measure(
        "positive_micro_f1",
        "positive micro F1",
        "Balance of found objects and right detections, at score 0.50, for prompts that are in the image.",
    ),
    Measure(
        "il_mcc",
        "IL_MCC",
        "Whether something is detected exactly when the thing is in the image, at score 0.50: 1 always, 0 by chance.",
    ),
    Measure(
        "off_prompt_fpr",
        "false alarms",
        "Share of the prompts absent from an image for which something was detected. Lower is better.",
    ),
    Measure(
        "presence_accuracy",
        "presence accuracy",
        "How often the model is right about whether the thing is in the image.",
    ),
    Measure("presence_accuracy_absent", "presence accuracy, absent", "The same for absent things."),
    Measure("num_detections", "detections", "With a score at or above the threshold."),
    Measure("num_predictions", "detections at any score", "The detections that mAP uses."),
    Measure(
        "num_predictions_before_nms",
        "the same with duplicates",
        "Before overlapping detections were suppressed or merged.",
    ),
)

SEMANTIC_MEASURES = (
    Measure(
        "semantic_mean_iou",
        "semantic mean IoU",
        "Of all pixels that belong to a prompt in the labels or in the model's semantic output, the share that does in "
        "both, at probability 0.50; mean over categories. It does not depend on detections.",
    ),
    Measure("semantic_dice", "semantic dice", "The same as dice: twice the shared pixels by the sum of both."),
)
"""Those that are there only if they were asked for."""


def measures_of(results: Sequence[Any]) -> list[Measure]:
    """The measures that a table of these results shows."""
    has_semantic = any("semantic" in result.settings for result in results)
    return [*MEASURES, *(SEMANTIC_MEASURES if has_semantic else ())]
