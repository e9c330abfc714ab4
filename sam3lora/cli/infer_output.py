"""What `sam3lora infer` writes and says, whatever it asks: checks before the model is loaded, progress, a summary."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sam3lora.cli.shared_options import nearest_existing
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from sam3lora.inference.image_folder import FolderResults

_SHOWN = 10


def check_writable(path: Path, image: Path | None = None) -> None:
    """Raise UserError for a file that cannot be written, or that is the image itself."""
    folder = nearest_existing(path.absolute().parent)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder that can be written to")
    if image is not None and path.resolve() == image.resolve():
        raise UserError(f"{path} is the image itself: choose another file")


def check_output_of_images(output: Path, images: Path) -> None:
    """Raise UserError for an output that is a file, or the folder of the images."""
    if output.suffix and not output.is_dir():
        why = (
            "--image is a folder, so --output must be one too" if images.is_dir() else "--output must be a folder here"
        )
        raise UserError(f"{why}, got {output}")
    if output.resolve() == images.resolve():
        raise UserError(f"--output {output} is the folder of the images: pictures could replace them")


def run_with_progress(
    num_images: int,
    run: Callable[[Callable[[], None]], FolderResults],
    *,
    source: Path,
    written: str,
    json: Path,
    tell: Callable[[FolderResults], None],
) -> None:
    """Run with a progress bar, then name bad images and tell what was found and written.

    Args:
        run: Gets what it has to call after each image.
        written: What there is beside the JSON file, and where.

    Raises:
        UserError: No image could be read.
        KeyboardInterrupt: Ctrl-C ended the run; what is done is told first.
    """
    from sam3lora.progress import Progress

    started = time.perf_counter()
    style = "bar" if sys.stderr.isatty() else "off"
    with Progress(num_images, style=style, stderr=True, transient=True) as bar:
        results = run(bar.advance)
    seconds = time.perf_counter() - started
    for item in results.skipped[:_SHOWN]:
        typer.echo(item["reason"], err=True)
    if len(results.skipped) > _SHOWN:
        typer.echo(f"... and {len(results.skipped) - _SHOWN} more, listed in {json}", err=True)
    num_read, num_skipped = len(results.images), len(results.skipped)
    if not num_read and not results.interrupted:
        raise UserError(f"none of the {num_skipped} images in {source} could be read")
    tell(results)
    skipped = f", {num_skipped} could not be read" if num_skipped else ""
    typer.echo(f"{num_read} of {num_images} images in {seconds:.1f} s{skipped}; {written}: {json}")
    if results.interrupted:
        typer.echo("interrupted: the images before are done", err=True)
        raise KeyboardInterrupt


def table_of(settings: dict[str, Any], *columns: str) -> Table:
    """An empty table whose title names the model and its adapters; all columns but the first hold numbers."""
    from rich.table import Table

    adapters = [str(settings[role]) for role in ("adapter", "click_adapter") if settings.get(role)]
    named = f"adapter {' and '.join(adapters)}" if adapters else "no adapter"
    title = f"{settings['model']} at {settings['resolution']} px, {named}"
    table = Table(columns[0], title=title, title_justify="left")
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def print_table(table: Table) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)
