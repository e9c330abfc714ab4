"""The metrics of clicks in the order of a report's table, explained in plain words."""

from __future__ import annotations

from sam3lora.evaluation.clicks.meter import REPORTED_CLICKS, THRESHOLDS
from sam3lora.evaluation.report.glossary import Measure

DECIDING_PERCENT = 85
DECIDING = f"noc_{DECIDING_PERCENT}"


def is_count(measure: Measure) -> bool:
    """Whether the measure is a number of objects."""
    return measure.name.startswith("nof_")


_REACH = "The number of clicks that an object takes until its mask has this IoU, averaged over objects; an object that "
CLICK_MEASURES = (
    Measure(
        f"noc_{THRESHOLDS[0]}",
        f"clicks to IoU 0.{THRESHOLDS[0]}",
        f"{_REACH}never gets there counts as the most clicks allowed. Lower is better.",
    ),
    *(Measure(f"noc_{percent}", f"clicks to IoU 0.{percent}", "The same.") for percent in THRESHOLDS[1:]),
    *(
        Measure(f"nof_{percent}", f"never at IoU 0.{percent}", "Number of objects that never get there.")
        for percent in THRESHOLDS
    ),
    *(
        Measure(
            f"mean_iou_{number}",
            f"mean IoU after {number} click{'s' if number > 1 else ''}",
            "Mean over objects of the IoU with the labelled mask.",
        )
        for number in REPORTED_CLICKS
    ),
    Measure(
        "oracle_iou_1",
        "best mask of the first click",
        "Mean IoU of the best of the masks that the first click is answered with. Where it is much higher than the "
        "mean IoU after 1 click, the model chooses the wrong one.",
    ),
    Measure(
        "score_error_1",
        "error of the expected IoU",
        "How far the IoU that the model expects of its first mask is from the real one, on average. Lower is better.",
    ),
)
