"""What all charts of a sweep share: the trials, the limits of the metric's axis, colours and marks.

In all charts the best trial is vermilion, the base configuration blue and dashed, the others grey; trials that were
stopped early are pale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from sam3lora.evaluation.report.charts import COLOURS, GREY, finish_chart
from sam3lora.tune.run.ledger import TrialRecord, has_value

BASE, BEST, FRONT = COLOURS[0], COLOURS[1], COLOURS[2]
_PALE = 0.35
_FAR_OFF = 6.0  # times the distance from best to median


@dataclass(frozen=True)
class ChartedTrials:
    """The trials and what the charts need to know of the sweep.

    Attributes:
        records: The trials of the sweep.
        metric: The key of the sweep's metric in `TrialRecord.history`.
        metric_label: Its name in the report.
        mode: "min" or "max": which values are better.
        best: Number of the best trial.
        base: Number of the base configuration's trial.
    """

    records: Sequence[TrialRecord]
    metric: str
    metric_label: str
    mode: str
    best: int | None = None
    base: int | None = None

    @property
    def measured(self) -> list[tuple[TrialRecord, float]]:
        """Trials that have a value, and the value. The best comes last, so that it is drawn on top."""
        known = [(r, r.value) for r in self.records if has_value(r) and r.value is not None]
        return sorted(known, key=lambda entry: (entry[0].number == self.best, entry[0].number == self.base))

    def limits(self) -> tuple[float, float]:
        """Ends of the metric's axis. A loss has no bound, so values far off are drawn at the edge."""
        values = sorted(value for _, value in self.measured)
        low, high = values[0], values[-1]
        median = values[len(values) // 2]
        if self.mode == "min" and median > low:
            high = min(high, low + _FAR_OFF * (median - low))
            high = max([high, *(value for record, value in self.measured if record.number == self.base)])
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
        return low - margin, high + margin


def line_look(trials: ChartedTrials, record: TrialRecord) -> tuple[Any, float, str, float, str]:
    """Colour, width, style, opacity and name in the legend."""
    if record.number == trials.best:
        return BEST, 2.6, "-", 1.0, "best"
    if record.number == trials.base:
        return BASE, 2.0, "--", 1.0, "base"
    if record.status == "stopped":
        return GREY, 0.8, "-", _PALE, "stopped early"
    return GREY, 1.1, "-", 1.0 if record.status == "finished" else _PALE, "other trials"


def draw_point(axes: Axes, trials: ChartedTrials, record: TrialRecord, x: float, y: float) -> None:
    """A trial as a point."""
    if record.number == trials.best:
        axes.plot([x], [y], "o", color=BEST, markersize=8, label="best")
        axes.annotate(f"{record.number}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    elif record.number == trials.base:
        axes.plot([x], [y], "D", color=BASE, markersize=5.5)
    elif record.status == "stopped":
        axes.plot([x], [y], "o", color=GREY, markersize=4.5, fillstyle="none", alpha=0.7, label="stopped early")
    else:
        axes.plot([x], [y], "o", color=GREY, markersize=4.5, label="other trials")


def draw_base_line(axes: Axes, trials: ChartedTrials) -> None:
    """The value of the base configuration, across the chart."""
    for value in (value for record, value in trials.measured if record.number == trials.base):
        axes.axhline(value, color=BASE, linewidth=1.2, linestyle="--", label="base")


def inside(value: float | None, low: float, high: float) -> float:
    """A value, cut to the ends of the axis; without a value the lower end."""
    return min(max(low if value is None else value, low), high)


def cut(text: str, letters: int) -> str:
    """A text, cut to a number of letters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def finished(axes: Axes, description: str) -> Markup:
    """The chart as SVG."""
    axes.tick_params(color=GREY, which="both")
    return finish_chart(axes, description)
