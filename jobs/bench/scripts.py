"""What scripts share that have one command: a user's mistake ends them with one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from sam3lora.errors import UserError
from sam3lora.local_paths import refuse_bad_path


def run_script(main: Callable[..., None]) -> int:
    """Run a function on the command line; returns the exit status: 2 after a user's mistake."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()  # ends the process itself where nothing is raised
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_output_folder(path: Path, option: str) -> Path:
    """Make the folder that an option names; its absolute path. Raises UserError if that cannot be done."""
    refuse_bad_path(path, option)
    folder = path.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder} ({error.strerror}): choose another one") from None
    return folder
