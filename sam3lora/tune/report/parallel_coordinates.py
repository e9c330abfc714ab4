"""The chart of a sweep's settings: an axis for each parameter, a line for each trial."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap

from sam3lora.evaluation.report.charts import GREY, chart_axes
from sam3lora.tune.report.charts import FRONT, ChartedTrials, cut, finished, inside, line_look
from sam3lora.tune.space.expressions import is_number
from sam3lora.tune.space.parameters import Choice, FreeParameter, value_text

_MOST_CATEGORIES = 8
_LINE_LETTERS = 62  # of the smallest text across a chart


def parallel_coordinates(
    trials: ChartedTrials, parameters: Sequence[FreeParameter], short: Mapping[str, str]
) -> Markup | None:
    """Axes from top to bottom, the metric last; the greener a trial's line, the better the trial.

    On the axis of a number with few values, each has a place of its own. `short` has the names of the axes.
    """
    keys = [parameter.key for parameter in parameters]
    shown = [(r, value) for r, value in trials.measured if all(key in r.values for key in keys)]
    if len(shown) < 2 or not parameters:
        return None
    low, high = trials.limits()
    places = [_places(parameter, [r.values[parameter.key] for r, _ in shown]) for parameter in parameters]
    ranking = sorted({value for _, value in shown}, reverse=trials.mode == "min")
    colours = LinearSegmentedColormap.from_list("value", ["#9ca3af", "#7fa88f", FRONT])
    description = "Settings and value of every trial"
    with chart_axes(description, height=0.5 + 0.66 * (len(parameters) + 1)) as axes:
        rows = [*(short[key] for key in keys), trials.metric_label]
        ticks = [*(own.ticks for own in places), _number_ticks(low, high, is_log=False)]
        for row, (name, own) in enumerate(zip(rows, ticks, strict=True)):
            axes.plot([0, 1], [row, row], color=GREY, linewidth=1, zorder=1)
            axes.text(0, row - 0.13, cut(name, 40), fontsize=8.5, fontweight="bold", zorder=5)
            for x, text in own:
                side = "left" if x < 0.02 else "right" if x > 0.98 else "center"
                axes.plot([x, x], [row - 0.05, row + 0.05], color=GREY, linewidth=1, zorder=1)
                axes.text(x, row + 0.1, text, fontsize=7.5, ha=side, va="top", linespacing=0.95, zorder=5)
        for number, (record, value) in enumerate(shown):
            jitter = 0.05 * ((number * 0.618) % 1 - 0.5)
            xs = [own.at(record.values[key], jitter) for key, own in zip(keys, places, strict=True)]
            xs.append((inside(value, low, high) - low) / (high - low))
            colour, width, style, alpha, text = line_look(trials, record)
            if text not in ("best", "base"):
                share = ranking.index(value) / max(1, len(ranking) - 1)
                colour, alpha, text = colours(share), (0.3 + 0.6 * share) * (0.6 if alpha < 1 else 1), "_"
            axes.plot(xs, range(len(rows)), style, color=colour, linewidth=width, alpha=alpha, label=text)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.45, -0.5))
        axes.set_axis_off()
        return finished(axes, description)


@dataclass(frozen=True)
class _Places:
    """Places of a parameter's values on its axis, in [0, 1]: `at` takes a value and an offset for equal ones."""

    ticks: list[tuple[float, str]]
    at: Callable[[Any, float], float]


def _places(parameter: FreeParameter, values: Sequence[Any]) -> _Places:
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


def _wrapped(text: str, letters: int) -> str:
    lines = textwrap.wrap(text, max(6, letters), max_lines=2, placeholder="…")
    return "\n".join(lines) or "…"
