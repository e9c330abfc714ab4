"""Charts as inline SVG for HTML pages: text stays text, and colours differ for colour-blind readers and in print."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sam3lora.evaluation.metrics.bootstrap import Interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_STYLES = ("-", "--", "-.", ":")
GREY = "#6b7280"
_GRID = "#e5e7eb"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # for measuring the text; the page shows its own font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(
    lines: Sequence[Line],
    *,
    description: str,
    x_label: str,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    y_low: float = 0.0,
    x_high: float = 1.0,
) -> Markup:
    """Curves over [0, 1], or to `x_high`; the y axis ends earlier where all values are low.

    Args:
        lines: Up to six have different colours.
        description: Text for readers who cannot see the chart, as in all charts.
        marks: Text -> x of a vertical line.
        y_low: Lower end of the y axis, for values that can be negative.
    """
    with chart_axes(description) as axes:
        for number, line in enumerate(lines):
            style = _STYLES[number % len(_STYLES)]
            axes.plot(line.xs, line.ys, style, color=COLOURS[number % len(COLOURS)], label=line.label, linewidth=1.8)
        for number, (text, x) in enumerate((marks or {}).items()):
            axes.axvline(x, color=GREY, linewidth=1, linestyle=":")
            side = "right" if x > 0.6 * x_high else "left"
            axes.annotate(
                text, (x, 1.0), xytext=(-3 if side == "right" else 3, -9 - 11 * number), ha=side, color="#374151",
                textcoords="offset points", xycoords=("data", "axes fraction"), fontsize=8,
            )  # fmt: skip
        highest = max(0.05, *(y for line in lines for y in line.ys))
        top = 1.02 if highest > 0.5 else 1.3 * highest
        axes.set(xlim=(0, x_high), ylim=(y_low, top), xlabel=x_label, ylabel=y_label)
        if x_high > 1:
            axes.locator_params(axis="x", integer=True)
        return finish_chart(axes, description, with_legend=len(lines) > 1)


def histogram_chart(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, description: str, x_label: str
) -> Markup:
    """The distribution of each group over bins, in percent of the group: a large group does not hide a small one.

    The bins are equally wide; at most two groups. The legend shows their sizes.
    """
    with chart_axes(description) as axes:
        width = (edges[1] - edges[0]) / len(counts)
        for number, (label, values) in enumerate(counts.items()):
            total = sum(values)
            axes.bar(
                [low + number * width for low in edges[:-1]],
                [100 * value / max(1, total) for value in values],
                width,
                align="edge",
                color=COLOURS[number],
                label=f"{label} ({total})",
                hatch=(None, "////")[number],
                edgecolor="white",
                linewidth=0.4,
            )
        axes.set(xlim=(edges[0], edges[-1]), xlabel=x_label, ylabel="percent")
        return finish_chart(axes, description)


def interval_chart(intervals: Mapping[str, Interval], *, description: str, x_label: str) -> Markup:
    """Differences as points with their intervals as bars, one below the other; those without a value are left out."""
    shown = [(name, entry.difference, entry) for name, entry in intervals.items() if entry.difference is not None]
    with chart_axes(description, height=0.9 + 0.3 * len(shown)) as axes:
        for row, (_, difference, entry) in enumerate(shown):
            colour = COLOURS[0] if entry.excludes_zero else GREY
            if entry.low is not None and entry.high is not None:
                axes.plot([entry.low, entry.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot([difference], [row], "o", color=colour, markersize=5)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(xlabel=x_label, yticks=range(len(shown)), ylim=(len(shown) - 0.4, -0.6))
        axes.set_yticklabels([name for name, *_ in shown])
        axes.grid(axis="y", visible=False)
        return finish_chart(axes, description, with_legend=False)


@contextmanager
def chart_axes(description: str, height: float = 2.9) -> Iterator[Axes]:
    """An empty chart in the common style, to draw on and to pass to `finish_chart` inside the block.

    The height is in inches; the width is 4.6. The description differs for each chart of a page.
    """
    # Ids that are unique on the page and reproducible.
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": description}):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.subplots()


def finish_chart(axes: Axes, description: str, with_legend: bool = True) -> Markup:
    """The chart as a transparent SVG element, with each label once in the legend above."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    if with_legend:
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles))
        figure.legend(once.values(), once.keys(), loc="outside upper left", ncols=3, fontsize=8)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(file.getvalue(), description))


def _inline(document: str, description: str) -> str:
    """The SVG element of a document, without prologue, metadata, namespaces, unused ids and font names."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|'DejaVu Sans', ", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"| (width|height)="[\d.]+pt"| id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace(f"stroke: {_GRID}", f"stroke: var(--line, {_GRID})")
    label = str(Markup.escape(description))
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
