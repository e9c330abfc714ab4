"""What the GPU benchmark should find on an H100 at 1008 pixels in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.bench.gpu_timing import Row
from jobs.bench.gpu_training_rows import CACHED, OURS, STOCK


@dataclass(frozen=True)
class Goal:
    """A limit of one column in the row that has the values `of`.

    Args:
        name: In words.
        section: Where the row is.
        of: Values that tell the row from the others.
        figure: The column.
        limit: The largest value, or the least one where `at_least`.
        beside: Values of another row: the figure is divided by that row's.
    """

    name: str
    section: str
    of: Row
    figure: str
    limit: float
    at_least: bool = False
    beside: Row | None = None

    def measured(self, rows: Sequence[Row]) -> float | None:
        value = _figure(rows, self.of, self.figure)
        if self.beside is None or value is None:
            return value
        other = _figure(rows, self.beside, self.figure)
        return value / other if other else None

    def row(self, rows: Sequence[Row]) -> Row | None:
        """None where the figure was not measured."""
        value = self.measured(rows)
        if value is None:
            return None
        met = value >= self.limit if self.at_least else value <= self.limit
        limit = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return {"goal": self.name, "limit": limit, "measured": value, "met": "yes" if met else "no"}


def goals_of(sections: Mapping[str, Sequence[Row]]) -> list[Row]:
    rows = (goal.row(sections.get(goal.section, ())) for goal in GOALS)
    return [row for row in rows if row is not None]


def _figure(rows: Sequence[Row], of: Row, figure: str) -> float | None:
    return next((row[figure] for row in rows if of.items() <= row.items() and row.get(figure) is not None), None)


def _training(preset: str, way: str = OURS, images: int = 1, prompts: int | str = "auto") -> Row:
    prompts = "pair by pair" if way == STOCK else prompts
    return {"preset": preset, "images": images, "way": way, "prompts at a time": prompts}


def _times_stock(preset: str, way: str, limit: float) -> Goal:
    name = f"{preset}{', cached' if way == CACHED else ''}: times stock + PEFT"
    return Goal(name, "training", _training(preset, way), "images/s", limit, True, _training(preset, STOCK))


GOALS = (
    Goal("first call, 1 prompt: ms", "engine", {"graphs": "on", "prompts": 1}, "first call ms", 40),
    Goal("first call, 8 prompts: ms", "engine", {"graphs": "on", "prompts": 8}, "first call ms", 50),
    Goal("again, 1 prompt: ms", "engine", {"graphs": "on", "prompts": 1}, "again ms", 8),
    Goal("again, 8 prompts: ms", "engine", {"graphs": "on", "prompts": 8}, "again ms", 12),
    Goal("adapter overhead, bank: %", "adapters", {"preset": "balanced"}, "bank adds %", 15),
    Goal("light, cached: images/s", "training", _training("light", CACHED), "images/s", 8, True),
    _times_stock("light", CACHED, 5),
    Goal("balanced: images/s", "training", _training("balanced"), "images/s", 4, True),
    _times_stock("balanced", OURS, 3),
    _times_stock("full", OURS, 3),
    Goal("light, 1 prompt at a time: GB", "training", _training("light", prompts=1), "peak GB", 4),
    Goal("balanced, 1 image: GB", "training", _training("balanced"), "peak GB", 8),
    Goal("maximum, 2 images: GB", "training", _training("maximum", images=2), "peak GB", 16),
    Goal("serving, 32 clients: times the plain server", "serving", {"clients": 32}, "ours / plain", 5, True),
)
