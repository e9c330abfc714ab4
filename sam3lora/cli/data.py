"""`sam3lora data ...`: look at a data set, or make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and make COCO data sets.", no_args_is_help=True)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder that holds train/ and valid/.", show_default=False)],
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write the report as JSON; - prints it instead.")
    ] = None,
) -> None:
    """Count objects and name every fault, with what training will do about it.

    Example:  sam3lora data check datasets/potholes --json report.json
    """
    from rich.console import Console

    from ..data.check import check_folder

    report = check_folder(folder)
    if json_path != "-":
        report.render(Console())
    if json_path is None:
        return
    text = json.dumps(report.to_dict(), indent=2)
    if json_path == "-":
        typer.echo(text)
    else:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="Folder to write train/ and valid/ into.", show_default=False)],
    num_train: Annotated[int, typer.Option(min=1, help="Training images.")] = 200,
    num_valid: Annotated[int, typer.Option(min=1, help="Validation images.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 224,
    domain: Annotated[
        str, typer.Option(help='"shift" = objects the built-in tiny model has not seen, "base" = those it has.')
    ] = "shift",
) -> None:
    """Draw labelled scenes, to try things with no data of one's own.

    Example:  sam3lora data synth outputs/shapes --num-train 200 --num-valid 50
    """
    from ..data.synth import write_dataset

    write_dataset(folder, num_train=num_train, num_valid=num_valid, seed=seed, size=size, domain=domain)
    typer.echo(f"wrote {num_train} training and {num_valid} validation images to {folder}")
