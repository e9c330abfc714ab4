"""The report of the serving benchmark: printed tables, and the same rows as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from jobs.bench.report import machine, machine_line, print_table


@dataclass(frozen=True)
class Rows:
    """A table: the keys of the rows are its headings, the first `keys` of them say what a row is about.

    `note` says how to read it.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    keys: int = 1

    def print(self, console: Console) -> None:
        console.print(f"\n[bold]{self.title}[/]\n", highlight=False)
        print_table(self.rows, console, keys=self.keys)
        if self.note:
            console.print(f"\n{self.note}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ServingReport:
    """All tables of one run, with what was asked and that both servers answer alike."""

    title: str
    tables: Sequence[Rows]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def table(self, beginning: str) -> Rows:
        """The table whose title begins so."""
        return next(table for table in self.tables if table.title.startswith(beginning))

    def to_dict(self) -> dict[str, Any]:
        tables = [{"title": table.title, "rows": list(table.rows), "note": table.note} for table in self.tables]
        return {"title": self.title, "machine": machine(), "facts": dict(self.facts), "tables": tables}

    def print(self, console: Console) -> None:
        console.print(f"\n{self.title}", highlight=False)
        for table in self.tables:
            table.print(console)
        console.print()
        for name, value in self.facts.items():
            console.print(f"{name}: {value}", highlight=False)
        console.print(machine_line(), highlight=False, soft_wrap=True)
