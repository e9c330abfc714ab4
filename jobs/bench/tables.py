"""Tables of plain text that are no wider than a terminal or a log."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GAP = "  "
MOST_TEXT = 36
"""Characters of a cell's line."""

_NUMERIC = re.compile(r"[-+.\d %/]*")


def text_table(rows: Sequence[Mapping[str, Any]], *, width: int = 80, keys: int = 1) -> list[str]:
    """The lines of a table whose headings are the names in the rows, in the order in which they first occur.

    A table that would be too wide has headings of several lines; columns that still find no room follow below, after
    the first columns again, with the rows that have anything there.

    Args:
        rows: Floats are shown with three digits, None and missing values as "-".
        width: Most characters of a line, if a column and the keys have that room at all.
        keys: Columns that say what a row is about.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [as_text(row.get(name)) for row in rows] for name in names}
    columns = [_Column(name, texts[name]) for name in names]
    if sum(column.full_width for column in columns) + len(GAP) * (len(columns) - 1) <= width:
        return _lines(columns, [column.full_width for column in columns], range(len(rows)))
    first, rest = columns[:keys], columns[keys:]
    blocks: list[list[str]] = []
    while rest:
        room = width - sum(column.least_width for column in first) - len(GAP) * (len(first) - 1)
        taken = 0
        while taken < len(rest) and (room := room - len(GAP) - rest[taken].least_width) >= 0:
            taken += 1
        block, rest = rest[: max(taken, 1)], rest[max(taken, 1) :]
        shown = [row for row in range(len(rows)) if not blocks or any(column.cells[row] != ["-"] for column in block)]
        columns = [*first, *block]
        blocks.append(_lines(columns, [column.least_width for column in columns], shown))
    return [line for number, block in enumerate(blocks) for line in ([""] * (number > 0) + block)]


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


class _Column:
    """A heading and its cells, each as one line or broken at spaces."""

    def __init__(self, heading: str, texts: Sequence[str]) -> None:
        self.heading = heading
        self.cells = [textwrap.wrap(text, MOST_TEXT, break_long_words=False) or [""] for text in texts]
        self.is_numeric = all(_NUMERIC.fullmatch(text) for text in texts)
        widest_cell = max((len(line) for cell in self.cells for line in cell), default=0)
        self.full_width = max(len(heading), widest_cell)
        self.least_width = max([widest_cell, *map(len, heading.split())])

    def lines(self, cell: Sequence[str], height: int, width: int, *, at_bottom: bool = False) -> list[str]:
        empty = [""] * (height - len(cell))
        padded = [*empty, *cell] if at_bottom else [*cell, *empty]
        return [line.rjust(width) if self.is_numeric else line.ljust(width) for line in padded]


def _lines(columns: Sequence[_Column], widths: Sequence[int], rows: Iterable[int]) -> list[str]:
    headings = [
        textwrap.wrap(c.heading, width, break_long_words=False) for c, width in zip(columns, widths, strict=True)
    ]
    lines = _row(columns, headings, widths, at_bottom=True)
    lines.append(GAP.join("-" * width for width in widths))
    for row in rows:
        lines += _row(columns, [column.cells[row] for column in columns], widths)
    return lines


def _row(
    columns: Sequence[_Column], cells: Sequence[Sequence[str]], widths: Sequence[int], *, at_bottom: bool = False
) -> list[str]:
    height = max(1, *map(len, cells))
    parts = [
        column.lines(cell, height, width, at_bottom=at_bottom)
        for column, cell, width in zip(columns, cells, widths, strict=True)
    ]
    return [GAP.join(line).rstrip() for line in zip(*parts, strict=True)]
