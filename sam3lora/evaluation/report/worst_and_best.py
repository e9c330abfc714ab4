"""Which images or objects a report shows: the worst, some in the middle, and the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sam3lora.evaluation.report.pictures import Picture


class Chosen(NamedTuple):
    """Positions of the worst, the worst first, of some in the middle, and of the best, the best first."""

    worst: list[int]
    median: list[int]
    best: list[int]

    @classmethod
    def of(cls, quality_N: np.ndarray, count: int) -> Chosen:
        """So many of each by rising quality.

        None is named twice, and NaN, of which no quality is known, is left out. With few the worst come first.
        """
        order = [int(row) for row in np.argsort(quality_N, kind="stable") if not np.isnan(quality_N[row])]
        worst = order[:count]
        best = [row for row in order[::-1][:count] if row not in worst]
        rest = [row for row in order if row not in worst and row not in best]
        start = max(0, (len(rest) - count) // 2)
        return cls(worst, rest[start : start + count], best)

    @property
    def number(self) -> int:
        """How many there are in all."""
        return sum(map(len, self))

    def sections(self, what: str, picture: Callable[[int], Picture]) -> list[tuple[str, list[Picture]]]:
        """(heading, pictures), without empty ones; `what` names the plural."""
        headings = (f"Worst {what}", f"{what.capitalize()} in the middle", f"Best {what}")
        return [(heading, [picture(row) for row in rows]) for heading, rows in zip(headings, self, strict=True) if rows]
