"""The charts of a sweep's report; each is None where there is nothing to draw.

In all of them the best trial is vermilion, the base configuration blue and dashed, the others grey; trials that were
stopped early are pale.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sam3lora.evaluate.charts import COLOURS, GREY, chart_axes, finish_chart
from sam3lora.tune.importance import Importance
from sam3lora.tune.parameters import Choice, Parameter, is_number, value_text
from sam3lora.tune.pareto import pareto_front
from sam3lora.tune.trials import TrialRecord, better, seconds_in_sessions

_BASE, _BEST, _FRONT = COLOURS[0], COLOURS[1], COLOURS[2]
_PALE = 0.35
_FAR_OFF = 6.0  # times the distance from best to median
_MANY = 20
_MOST_CATEGORIES = 8
_LINE_LETTERS = 62  # of the smallest text across a chart


@dataclass(frozen=True)
class ChartedTrials:
    """What the charts show.

    Attributes:
        records: The trials of the sweep.
        metric: The key of its metric in `TrialRecord.history`.
        metric_label: What to call it.
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
        """Trials that have a value, with it: the best last, so that it is drawn on top."""
        known = [(r, r.value) for r in self.records if r.value is not None and r.status != "failed"]
        return sorted(known, key=lambda entry: (entry[0].number == self.best, entry[0].number == self.base))

    def limits(self) -> tuple[float, float]:
        """Ends of the metric's axis. A loss has no bound: one that is far off is left at the edge."""
        values = sorted(value for _, value in self.measured)
        low, high = values[0], values[-1]
        median = values[len(values) // 2]
        if self.mode == "min" and median > low:
            high = min(high, low + _FAR_OFF * (median - low))
            high = max([high, *(value for record, value in self.measured if record.number == self.base)])
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
        return low - margin, high + margin


def progress_chart(trials: ChartedTrials, sessions: Sequence[Mapping[str, float]]) -> Markup | None:
    """Each trial at the time it ended and the best value until then, over the time that the sweep ran.

    Args:
        trials: The trials.
        sessions: ``started_at`` and ``ended_at`` of each start of the sweep, seconds since 1970.
    """
    ended = [
        (seconds_in_sessions(record.ended_at, list(sessions)), record, value)
        for record, value in trials.measured
        if record.ended_at is not None
    ]
    if not ended:
        return None
    scale, unit = _time_unit(max(seconds for seconds, *_ in ended))
    low, high = trials.limits()
    description = f"{trials.metric_label} of the trials and the best so far, over time"
    with chart_axes(description) as axes:
        best: float | None = None
        steps: list[tuple[float, float]] = []
        for seconds, _, value in sorted(ended, key=lambda entry: entry[0]):
            best = value if best is None or better(value, best, trials.mode) else best
            steps.append((seconds / scale, best))
        axes.step(*zip(*steps, strict=True), where="post", color=_FRONT, linewidth=1.8, label="best so far")
        _base_line(axes, trials)
        for seconds, record, value in ended:
            _point(axes, trials, record, seconds / scale, _inside(value, low, high))
        axes.set(ylim=(low, high), xlabel=f"time the sweep ran ({unit})", ylabel=trials.metric_label)
        axes.set_xlim(left=0)
        return _finished(axes, description)


def learning_curves(trials: ChartedTrials) -> Markup | None:
    """The metric by epoch, of every trial; a cross ends those that were stopped."""
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
            colour, width, style, alpha, label = _line_look(trials, record)
            if len(curves) > _MANY and label == "other trials":
                width, alpha = 0.8, alpha * 0.6
            xs, ys = zip(*points, strict=True)
            mark = "o" if len(points) == 1 else None
            axes.plot(xs, ys, style, color=colour, linewidth=width, alpha=alpha, marker=mark, markersize=4, label=label)
            if record.status == "stopped":
                axes.plot(xs[-1:], [_inside(ys[-1], low, high)], "x", color=colour, markersize=5, label="stopped early")
        axes.set(ylim=(low, high), xlabel="epoch", ylabel=trials.metric_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _finished(axes, description)


def size_chart(trials: ChartedTrials) -> Markup | None:
    """Value against trainable parameters, with the trials that no other beats in both."""
    shown = [(record, value) for record, value in trials.measured if record.trainable_parameters > 0]
    if not shown:
        return None
    low, high = trials.limits()
    front = pareto_front([record for record, _ in shown], trials.mode)
    description = f"{trials.metric_label} against trainable parameters"
    with chart_axes(description) as axes:
        points = [(r.trainable_parameters, _inside(r.value, low, high)) for r in front if r.value is not None]
        axes.plot(*zip(*points, strict=True), "-", color=_FRONT, linewidth=1.6, label="best for its size")
        _base_line(axes, trials)
        for record, value in shown:
            _point(axes, trials, record, record.trainable_parameters, _inside(value, low, high))
        sizes = [record.trainable_parameters for record, _ in shown]
        axes.set_xscale("log")
        axes.set(xlim=(min(sizes) / 1.3, max(sizes) * 1.3), ylim=(low, high))
        axes.set(xlabel="trainable parameters", ylabel=trials.metric_label)
        ticks = _spread(sorted(set(sizes)), min(sizes) / 1.3, max(sizes) * 1.3)
        axes.set_xticks(ticks)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        return _finished(axes, description)


def importance_chart(importances: Sequence[Importance], short: Mapping[str, str]) -> Markup | None:
    """How much each parameter mattered, and how much a parameter without effect would seem to.

    Args:
        importances: Those without a value are left out.
        short: Parameter -> what to call it.
    """
    shown = [(entry, entry.chance) for entry in importances if entry.chance is not None]
    if not shown:
        return None
    description = "How much each parameter mattered"
    with chart_axes(description, height=1.0 + 0.32 * len(shown)) as axes:
        colours = {"clear": _BEST, "maybe": COLOURS[4]}
        for row, (entry, chance) in enumerate(shown):
            verdict = entry.verdict or ""
            axes.barh(row, entry.epsilon_squared or 0, 0.62, color=colours.get(verdict, "#9ca3af"), label=verdict)
            axes.plot([chance, chance], [row - 0.42, row + 0.42], color=GREY, linewidth=2, label="chance level")
        axes.set(xlim=(0, 1), xlabel="share of the ranking that goes with it (ε²)", yticks=range(len(shown)))
        axes.set_yticklabels([_cut(short[entry.parameter], 24) for entry, _ in shown])
        axes.set_ylim(len(shown) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        return _finished(axes, description)


def parallel_coordinates(
    trials: ChartedTrials, parameters: Sequence[Parameter], short: Mapping[str, str]
) -> Markup | None:
    """One axis a parameter, from top to bottom, the metric last; a line a trial, the greener the better.

    Args:
        trials: The trials.
        parameters: The axes. A numeric one of few values has a place for each.
        short: Parameter -> what to call it.
    """
    keys = [parameter.key for parameter in parameters]
    shown = [(r, value) for r, value in trials.measured if all(key in r.values for key in keys)]
    if len(shown) < 2 or not parameters:
        return None
    low, high = trials.limits()
    places = [_places(parameter, [r.values[parameter.key] for r, _ in shown]) for parameter in parameters]
    ranking = sorted({value for _, value in shown}, reverse=trials.mode == "min")
    colours = LinearSegmentedColormap.from_list("value", ["#9ca3af", "#7fa88f", _FRONT])
    description = "Settings and value of every trial"
    with chart_axes(description, height=0.5 + 0.66 * (len(parameters) + 1)) as axes:
        rows = [*(short[key] for key in keys), trials.metric_label]
        ticks = [*(own.ticks for own in places), _number_ticks(low, high, is_log=False)]
        for row, (name, own) in enumerate(zip(rows, ticks, strict=True)):
            axes.plot([0, 1], [row, row], color=GREY, linewidth=1, zorder=1)
            axes.text(0, row - 0.13, _cut(name, 40), fontsize=8.5, fontweight="bold", zorder=5)
            for x, text in own:
                side = "left" if x < 0.02 else "right" if x > 0.98 else "center"
                axes.plot([x, x], [row - 0.05, row + 0.05], color=GREY, linewidth=1, zorder=1)
                axes.text(x, row + 0.1, text, fontsize=7.5, ha=side, va="top", linespacing=0.95, zorder=5)
        for number, (record, value) in enumerate(shown):
            jitter = 0.05 * ((number * 0.618) % 1 - 0.5)
            xs = [own.at(record.values[key], jitter) for key, own in zip(keys, places, strict=True)]
            xs.append((_inside(value, low, high) - low) / (high - low))
            colour, width, style, alpha, text = _line_look(trials, record)
            if text not in ("best", "base"):
                share = ranking.index(value) / max(1, len(ranking) - 1)
                colour, alpha, text = colours(share), (0.3 + 0.6 * share) * (0.6 if alpha < 1 else 1), "_"
            axes.plot(xs, range(len(rows)), style, color=colour, linewidth=width, alpha=alpha, label=text)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.45, -0.5))
        axes.set_axis_off()
        return _finished(axes, description)


def short_count(value: float) -> str:
    """1234567 -> "1.2 M"."""
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:g}"


@dataclass(frozen=True)
class _Places:
    """Where a parameter's values stand on its axis, in [0, 1]: `at` takes a value and what sets equal values apart."""

    ticks: list[tuple[float, str]]
    at: Callable[[Any, float], float]


def _places(parameter: Parameter, values: Sequence[Any]) -> _Places:
    numeric = parameter.is_numeric and all(map(is_number, values))
    low, high = (min(values), max(values)) if numeric else (0, 1)
    if numeric and len(set(values)) > _MOST_CATEGORIES - 2:
        is_log = parameter.is_log and low > 0
        scale = math.log if is_log else float
        first, extent = scale(low), scale(high) - scale(low)
        return _Places(_number_ticks(low, high, is_log), lambda value, _: (scale(value) - first) / extent)
    if numeric:
        values = sorted(values)
    elif isinstance(parameter, Choice):
        values = [*(value for value in parameter.values if value in values), *values]
    names = list(dict.fromkeys(map(parameter.label, values)))
    if len(names) == 1:
        return _Places([(0.5, _wrapped(names[0], _LINE_LETTERS))], lambda value, jitter: 0.5 + jitter)
    step = 1 / (len(names) - 1)
    every = -(-len(names) // _MOST_CATEGORIES)
    letters = _LINE_LETTERS * every // len(names) - 1
    ticks = [(number * step, _wrapped(name, letters)) for number, name in enumerate(names) if number % every == 0]
    return _Places(ticks, lambda value, jitter: names.index(parameter.label(value)) * step + jitter * step)


def _number_ticks(low: float, high: float, is_log: bool) -> list[tuple[float, str]]:
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    return [(x, value_text(float(f"{value:.3g}"))) for x, value in ((0.0, low), (0.5, middle), (1.0, high))]


def _line_look(trials: ChartedTrials, record: TrialRecord) -> tuple[Any, float, str, float, str]:
    """Colour, width, style, opacity and name in the legend."""
    if record.number == trials.best:
        return _BEST, 2.6, "-", 1.0, "best"
    if record.number == trials.base:
        return _BASE, 2.0, "--", 1.0, "base"
    if record.status == "stopped":
        return GREY, 0.8, "-", _PALE, "stopped early"
    return GREY, 1.1, "-", 1.0 if record.status == "finished" else _PALE, "other trials"


def _point(axes: Axes, trials: ChartedTrials, record: TrialRecord, x: float, y: float) -> None:
    if record.number == trials.best:
        axes.plot([x], [y], "o", color=_BEST, markersize=8, label="best")
        axes.annotate(f"{record.number}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    elif record.number == trials.base:
        axes.plot([x], [y], "D", color=_BASE, markersize=5.5)
    elif record.status == "stopped":
        axes.plot([x], [y], "o", color=GREY, markersize=4.5, fillstyle="none", alpha=0.7, label="stopped early")
    else:
        axes.plot([x], [y], "o", color=GREY, markersize=4.5, label="other trials")


def _base_line(axes: Axes, trials: ChartedTrials) -> None:
    for value in (value for record, value in trials.measured if record.number == trials.base):
        axes.axhline(value, color=_BASE, linewidth=1.2, linestyle="--", label="base")


def _curve(record: TrialRecord, metric: str) -> list[tuple[float, float]]:
    points = {entry["epoch"]: entry[metric] for entry in record.history if entry.get(metric) is not None}
    return sorted(points.items())


def _time_unit(seconds: float) -> tuple[float, str]:
    return (3600, "hours") if seconds > 3 * 3600 else (60, "minutes") if seconds > 180 else (1, "seconds")


def _inside(value: float | None, low: float, high: float) -> float:
    return min(max(low if value is None else value, low), high)


def _spread(sizes: Sequence[int], low: float, high: float) -> list[int]:
    """Of these places on a logarithmic axis those whose texts do not meet."""
    chosen: list[int] = []
    for size in sizes:
        if not chosen or math.log(size / chosen[-1]) > 0.14 * math.log(high / low):
            chosen.append(size)
    return chosen


def _wrapped(text: str, letters: int) -> str:
    lines = textwrap.wrap(text, max(6, letters), max_lines=2, placeholder="…")
    return "\n".join(lines) or "…"


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _finished(axes: Axes, description: str) -> Markup:
    axes.tick_params(color=GREY, which="both")
    return finish_chart(axes, description)
