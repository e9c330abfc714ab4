"""Starting a script that has one command, with a user's mistake as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from sam3lora.errors import UserError


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
