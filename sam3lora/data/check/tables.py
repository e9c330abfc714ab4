"""The check report as tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from sam3lora.data.check.report import CheckReport, SplitReport

_LEAKS = {
    "same_content": "identical files in both splits: validation is not independent",
    "same_source": "copies of one picture in both splits: validation is not independent",
    "neighbouring_frames": "names look like frames or tiles of one recording in both splits: validation is optimistic",
}


def render_report(report: CheckReport, console: Console | None = None) -> None:
    """Print one block a split, then what the splits share."""
    console = console or Console()
    for split in report.splits:
        _render_split(split, console)
    for leak in report.leaks:
        console.print(f"[yellow]{' / '.join(leak.splits)}: {leak.count} x {_LEAKS[leak.kind]}[/yellow]")
        console.print(f"  e.g. {escape('; '.join(leak.examples))}", highlight=False)
    if not report.num_faults:
        console.print("No faults found.")


def _render_split(split: SplitReport, console: Console) -> None:
    from sam3lora.data.check.report import MAX_DETECTIONS, NUM_OBJECT_QUERIES

    console.print(
        f"[bold]{escape(split.name)}[/bold]: {split.num_images} images ({split.num_negatives} without objects, "
        f"{split.num_augmented_copies} augmented copies), {split.num_objects} objects "
        f"({split.sizes['small']} small, {split.sizes['medium']} medium, {split.sizes['large']} large), "
        f"{split.num_crowd} crowd regions"
    )
    console.print(
        f"  most objects: {split.max_objects_per_image} in an image, {split.max_objects_per_query} of one category "
        f"(the model has {NUM_OBJECT_QUERIES} queries); "
        f"{split.num_images_above_max_detections} images above COCO's {MAX_DETECTIONS} detections"
    )
    categories = Table("category", "images", "objects")
    for name, counts in split.categories.items():
        categories.add_row(escape(name), str(counts["images"]), str(counts["objects"]))
    console.print(categories)
    if len(split.issues):
        issues = Table("count", "fault", "what is done", "for example")
        for issue in split.issues:
            issues.add_row(str(issue.count), issue.description, issue.action, escape("; ".join(issue.examples)))
        console.print(issues)
