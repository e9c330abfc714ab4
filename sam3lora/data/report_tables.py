"""Terminal tables for the reports of `sam3lora data check`, `convert` and `split`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sam3lora.data.check import MAX_DETECTIONS, NUM_OBJECT_QUERIES
from sam3lora.data.fault_report import left_out_sentence, split_faults, table_rows
from sam3lora.data.faults import LEVELS, LOST

if TYPE_CHECKING:
    from sam3lora.data.check import CheckedSplit, CheckReport
    from sam3lora.data.convert import ConversionReport
    from sam3lora.data.faults import Fault
    from sam3lora.data.label_check import LabelledSplit, LabelReport
    from sam3lora.data.split.splitting import SplittingReport

TOLERANCE = 0.05  # a split whose share of the images is further from its fraction is reported

WORTH_MULTILABEL = 0.01  # share of hidden pixels from which the report names mode multilabel

_LEAKS = {
    "same_content": "identical files in both splits: validation is not independent",
    "same_source": "copies of one picture in both splits: validation is not independent",
    "neighbouring_frames": "names look like frames or tiles of one recording in both splits: validation is optimistic",
}


def print_check(report: CheckReport, console: Console) -> None:
    for split in report.splits:
        _print_checked_split(split, console)
    if report.labels:
        _print_labels(report.labels, console)
    for leak in report.leaks:
        console.print(f"[yellow]{' / '.join(leak.splits)}: {leak.count} x {_LEAKS[leak.kind]}[/yellow]")
        console.print(f"  e.g. {escape('; '.join(leak.examples))}", highlight=False)
    if not report.num_faults:
        console.print("No faults found.")
    _print_left_out([fault for split in report.splits for fault in split.faults], console)


def _print_labels(report: LabelReport, console: Console) -> None:
    for split in report.splits:
        _print_labelled_split(split, console)
    alone = report.classes_in_one_split()
    for split in report.splits:
        if names := [name for name, where in alone.items() if where == split.name]:
            console.print(f"[yellow]Pixels in {escape(split.name)} only: {escape(', '.join(names))}[/yellow]")


def _print_labelled_split(split: LabelledSplit, console: Console) -> None:
    smallest, largest, commonest = (
        f"{width} x {height}" for height, width in (split.smallest_hw, split.largest_hw, split.commonest_hw)
    )
    several = f"{split.num_sizes} sizes from {smallest} to {largest}, most often {commonest}"
    console.print(
        f"[bold]{escape(split.name)}[/bold] as label maps: {split.num_images} images ({split.num_empty_images} without "
        f"a pixel of any class) of {largest if split.num_sizes == 1 else several}"
    )
    if split.num_ignored:
        console.print(
            f"  {split.ignored_share:.2%} of the pixels are ignored: void, crowd regions, and the boxes of "
            f"{split.num_boxes} objects without a mask"
        )
    classes = Table("class", "images", "pixels", "share", "hidden pixels")
    classes.add_row(
        "background", "", f"{split.num_background:,}", f"{split.share(split.num_background):.2%}", "", end_section=True
    )
    for name, one in split.classes.items():
        counts = str(one.num_images), f"{one.num_pixels:,}", f"{split.share(one.num_pixels):.2%}", f"{one.num_hidden:,}"
        classes.add_row(escape(name), *counts)
    console.print(classes)
    if split.hidden_share >= WORTH_MULTILABEL:
        console.print(
            f"{split.hidden_share:.2%} of the pixels of masks are hidden: a smaller object of another class has them. "
            "dense.mode multilabel keeps them"
        )


def print_conversion(report: ConversionReport, console: Console) -> None:
    console.print(f"{report.source_format} -> {report.target_format}: {report.target}", markup=False)
    _print_splits(report.splits, console)
    _print_faults(report.faults, console)
    _print_left_out(report.faults, console)


def print_splitting(report: SplittingReport, console: Console) -> None:
    _print_splits(report.splits, console)
    groups = sum(split["num_groups"] for split in report.splits.values())
    console.print(f"{groups} groups of images that belong together, the largest of {report.largest_group}")
    num_images = sum(split["num_images"] for split in report.splits.values())
    for name, fraction in report.fractions.items():
        share = report.splits[name]["num_images"] / num_images
        if abs(share - fraction) > TOLERANCE:
            console.print(f"[yellow]{name} has {share:.0%} of the images, not {fraction:.0%}[/yellow]")
    if report.leaks:
        console.print(
            f"[yellow]{sum(leak.count for leak in report.leaks)} names look like neighbouring frames or tiles of one "
            f"recording in two splits, e.g. {escape(report.leaks[0].examples[0])}: --group-by keeps them together[/]"
        )
    _print_faults(report.faults, console)
    _print_left_out(report.faults, console)


def _print_checked_split(split: CheckedSplit, console: Console) -> None:
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
    _print_faults(split.faults, console)


def _print_splits(splits: dict[str, dict[str, Any]], console: Console) -> None:
    """Images and objects, with one column per split."""
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


def _print_faults(faults: Iterable[Fault], console: Console) -> None:
    """One row per kind, what is lost first; nothing if there are no faults."""
    table = Table("level", "count", "fault", "what is done", Column("for example", overflow="fold"))
    _, rows = table_rows(split_faults("", faults, LEVELS))
    for level, counts, *texts in rows:
        table.add_row(level, *counts, *map(escape, texts), style="bold" if level == LOST else None)
    if table.row_count:
        console.print(table)


def _print_left_out(faults: Iterable[Fault], console: Console) -> None:
    if sentence := left_out_sentence(split_faults("", faults)):
        console.print(f"[yellow]{sentence}[/yellow]")
