"""What a conversion or a split wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sam3lora.data.convert.faults import Fault

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class ConversionReport:
    """What `convert_folder` wrote.

    Args:
        target: The new folder.
        source_format: One of `SOURCE_FORMATS`.
        target_format: One of `TARGET_FORMATS`.
        splits: Split -> `num_images`, `num_negatives`, `num_objects`, `categories` (name -> objects).
        faults: What was repaired, left out or cannot be expressed.
    """

    target: str
    source_format: str
    target_format: str
    splits: dict[str, dict[str, Any]]
    faults: list[Fault] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "faults": [fault.to_dict() for fault in self.faults]}

    def render(self, console: Console | None = None) -> None:
        """Print tables."""
        from rich.console import Console

        console = console or Console()
        console.print(f"{self.source_format} -> {self.target_format}: {self.target}", markup=False)
        render_splits(self.splits, console)
        render_faults(self.faults, console)


def render_splits(splits: dict[str, dict[str, Any]], console: Console) -> None:
    """Images and objects, a column a split."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", *(escape(name) for name in splits))
    table.add_row("images", *(str(split["num_images"]) for split in splits.values()))
    table.add_row("without objects", *(str(split["num_negatives"]) for split in splits.values()))
    table.add_row("objects", *(str(split["num_objects"]) for split in splits.values()), end_section=True)
    num_unused = 0
    for category in next(iter(splits.values()))["categories"]:
        counts = [split["categories"][category] for split in splits.values()]
        if any(counts):
            table.add_row(escape(category), *map(str, counts))
        else:
            num_unused += 1
    console.print(table)
    if num_unused:
        console.print(f"{num_unused} categories without objects")


def render_faults(faults: Iterable[Fault], console: Console) -> None:
    """A row a kind; nothing where there are none."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("count", "fault", "what was done", "for example")
    for fault in faults:
        table.add_row(str(fault.count), fault.description, fault.action, escape("; ".join(fault.examples)))
    if table.row_count:
        console.print(table)
