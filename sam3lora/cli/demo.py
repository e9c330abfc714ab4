"""`sam3lora demo`: the whole product in a few minutes on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the data, the run and the report.")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Make a small labelled set, train an adapter on two workers, compare it with the base and write a report.

    Example:  sam3lora demo --output outputs/demo
    """
    from sam3lora.cli.demo_run import run_demo

    run_demo(output)
