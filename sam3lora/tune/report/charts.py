"""The charts of a sweep's report, except that of the settings; each is None if there is nothing to draw.

In all charts the best trial is vermilion, the base configuration blue and dashed, the others grey; trials that were
stopped early are pale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sam3lora.evaluation.report.charts import COLOURS, GREY, chart_axes, finish_chart
from sam3lora.tune.report.importance import Importance
from sam3lora.tune.run.ledger import TrialRecord, better, has_value, seconds_in_sessions

BASE, BEST, FRONT = COLOURS[0], COLOURS[1], COLOURS[2]
_PALE = 0.35
_FAR_OFF = 6.0  # times the distance from best to median


@dataclass(frozen=True)
class ChartedTrials:
    """The trials and what the charts need to know of the sweep."""

    records: Sequence[TrialRecord]
    metric: str  # its key in `TrialRecord.history`
    metric_label: str
    mode: str  # "min" or "max": which values are better
    best: int | None = None  # number of the best trial
    base: int | None = None  # number of the base configuration's trial

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
    return text if len(text) <= letters else text[: letters - 1] + "…"


def finished(axes: Axes, description: str) -> Markup:
    axes.tick_params(color=GREY, which="both")
    return finish_chart(axes, description)


_MANY = 20


def progress_chart(trials: ChartedTrials, sessions: Sequence[Mapping[str, float]]) -> Markup | None:
    """Each trial at the time it ended, and the best value so far, over the time that the sweep ran.

    `sessions` has ``started_at`` and ``ended_at`` of each start of the sweep, seconds since 1970.
    """
    ended = [
        (seconds_in_sessions(record.ended_at, list(sessions)), record, value)
        for record, value in trials.measured
        if record.ended_at is not None
    ]
    if not ended:
        return None
    last = max(seconds for seconds, *_ in ended)
    scale, unit = (3600, "hours") if last > 3 * 3600 else (60, "minutes") if last > 180 else (1, "seconds")
    low, high = trials.limits()
    description = f"{trials.metric_label} of the trials and the best so far, over time"
    with chart_axes(description) as axes:
        best: float | None = None
        steps: list[tuple[float, float]] = []
        for seconds, _, value in sorted(ended, key=lambda entry: entry[0]):
            best = value if best is None or better(value, best, trials.mode) else best
            steps.append((seconds / scale, best))
        axes.step(*zip(*steps, strict=True), where="post", color=FRONT, linewidth=1.8, label="best so far")
        draw_base_line(axes, trials)
        for seconds, record, value in ended:
            draw_point(axes, trials, record, seconds / scale, inside(value, low, high))
        axes.set(ylim=(low, high), xlabel=f"time the sweep ran ({unit})", ylabel=trials.metric_label)
        axes.set_xlim(left=0)
        return finished(axes, description)


def learning_curves(trials: ChartedTrials) -> Markup | None:
    """The metric of every trial by epoch; a cross marks the end of stopped ones."""
    drawn = sorted(trials.records, key=lambda r: (r.number == trials.best, r.number == trials.base))
    curves = [(record, points) for record in drawn if (points := _curve(record, trials.metric))]
    if not curves or not trials.measured:
        return None
    values = [y for _, points in curves for _, y in points]
    low, high = trials.limits()
    if trials.mode == "max":
        low, high = min(low, *values), max(high, *values)
    elif first := [points[0][1] for record, points in curves if record.number in (trials.best, trials.base)]:
        high = max(high, *first)
    description = f"{trials.metric_label} by epoch, of every trial"
    with chart_axes(description) as axes:
        for record, points in curves:
            colour, width, style, alpha, label = line_look(trials, record)
            if len(curves) > _MANY and label == "other trials":
                width, alpha = 0.8, alpha * 0.6
            xs, ys = zip(*points, strict=True)
            mark = "o" if len(points) == 1 else None
            axes.plot(xs, ys, style, color=colour, linewidth=width, alpha=alpha, marker=mark, markersize=4, label=label)
            if record.status == "stopped":
                axes.plot(xs[-1:], [inside(ys[-1], low, high)], "x", color=colour, markersize=5, label="stopped early")
        axes.set(ylim=(low, high), xlabel="epoch", ylabel=trials.metric_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return finished(axes, description)


def size_chart(trials: ChartedTrials) -> Markup | None:
    """Value against trainable parameters, with the Pareto front."""
    shown = [(record, value) for record, value in trials.measured if record.trainable_parameters > 0]
    if not shown:
        return None
    low, high = trials.limits()
    front = pareto_front([record for record, _ in shown], trials.mode)
    description = f"{trials.metric_label} against trainable parameters"
    with chart_axes(description) as axes:
        points = [(r.trainable_parameters, inside(r.value, low, high)) for r in front if r.value is not None]
        axes.plot(*zip(*points, strict=True), "-", color=FRONT, linewidth=1.6, label="best for its size")
        draw_base_line(axes, trials)
        for record, value in shown:
            draw_point(axes, trials, record, record.trainable_parameters, inside(value, low, high))
        sizes = [record.trainable_parameters for record, _ in shown]
        axes.set_xscale("log")
        axes.set(xlim=(min(sizes) / 1.3, max(sizes) * 1.3), ylim=(low, high))
        axes.set(xlabel="trainable parameters", ylabel=trials.metric_label)
        ticks = _spread(sorted(set(sizes)), min(sizes) / 1.3, max(sizes) * 1.3)
        axes.set_xticks(ticks)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        return finished(axes, description)


def importance_chart(importances: Sequence[Importance], short: Mapping[str, str]) -> Markup | None:
    """How much each parameter mattered, and how much a parameter without effect would by chance.

    Parameters whose importance is not known are left out. `short` has their names in the chart.
    """
    shown = [(entry, entry.chance) for entry in importances if entry.chance is not None]
    if not shown:
        return None
    description = "How much each parameter mattered"
    with chart_axes(description, height=1.0 + 0.32 * len(shown)) as axes:
        colours = {"clear": BEST, "maybe": COLOURS[4]}
        for row, (entry, chance) in enumerate(shown):
            effect = entry.effect or ""
            axes.barh(row, entry.epsilon_squared or 0, 0.62, color=colours.get(effect, "#9ca3af"), label=effect)
            axes.plot([chance, chance], [row - 0.42, row + 0.42], color=GREY, linewidth=2, label="chance level")
        axes.set(xlim=(0, 1), xlabel="share of the ranking that goes with it (ε²)", yticks=range(len(shown)))
        axes.set_yticklabels([cut(short[entry.parameter], 24) for entry, _ in shown])
        axes.set_ylim(len(shown) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        return finished(axes, description)


def pareto_front(records: Iterable[TrialRecord], mode: str) -> list[TrialRecord]:
    """The trials that no other beats in both value and trainable parameters, by rising size and so rising quality.

    A trial is left out if another is as good and smaller, or as small and better, or if it has no value. Trials that
    are equal in both are all kept.
    """
    measured = [record for record in records if has_value(record)]

    def beats(other: TrialRecord, record: TrialRecord) -> bool:
        if other.trainable_parameters > record.trainable_parameters or better(record.value, other.value, mode):
            return False
        return other.trainable_parameters < record.trainable_parameters or better(other.value, record.value, mode)

    front = [record for record in measured if not any(beats(other, record) for other in measured)]
    return sorted(front, key=lambda record: (record.trainable_parameters, record.number))


def short_count(value: float) -> str:
    """1234567 -> "1.2 M"."""
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:g}"


def _curve(record: TrialRecord, metric: str) -> list[tuple[float, float]]:
    points = {entry["epoch"]: entry[metric] for entry in record.history if entry.get(metric) is not None}
    return sorted(points.items())


def _spread(sizes: Sequence[int], low: float, high: float) -> list[int]:
    """Those of these places on a logarithmic axis whose labels do not overlap."""
    chosen: list[int] = []
    for size in sizes:
        if not chosen or math.log(size / chosen[-1]) > 0.14 * math.log(high / low):
            chosen.append(size)
    return chosen
