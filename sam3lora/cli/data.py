"""`sam3lora data ...`: look at a data set, or make one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3lora.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Check, convert, split and make COCO data sets.", no_args_is_help=True)

Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write the report as JSON; - prints it instead.")
]
MOST_PROCESSES = 16  # of `data check`, each of some 150 MB


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder that holds train/ and valid/.", show_default=False)],
    task: Annotated[
        str, typer.Option(help='What the data are for; "dense" also counts the pixels of each class.')
    ] = "detection",
    json_path: Json = None,
) -> None:
    """Count objects and name every fault, with what training will do about it.

    Example:  sam3lora data check datasets/potholes --json report.json
    """
    from sam3lora.cpus import usable_cpus
    from sam3lora.data.check import check_folder
    from sam3lora.data.label_check import check_labels
    from sam3lora.data.report_tables import print_check

    if task not in ("detection", "dense"):
        raise UserError(f"unknown --task {task!r}; expected detection or dense")
    num_processes = min(usable_cpus(), MOST_PROCESSES)
    report = check_folder(folder, num_processes=num_processes, progress=True)
    if task == "dense":
        report.labels = check_labels(folder, num_processes=num_processes, progress=True)
    _show(report, print_check, json_path)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the labelled data set.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    source_format: Annotated[
        str | None, typer.Option("--from", help="coco, yolo, voc, masks or labelme; told from the files if possible.")
    ] = None,
    target_format: Annotated[str, typer.Option("--to", help="coco, yolo, yolo-boxes or masks.")] = "coco",
    names: Annotated[
        list[str] | None,
        typer.Option(metavar="A B ...", help="Category names in order, where the source does not say them."),
    ] = None,
    instances: Annotated[
        bool, typer.Option("--instances", help="Values in mask images number objects, not categories.")
    ] = False,
    components: Annotated[
        bool, typer.Option("--components", help="Every connected part of a mask image is an object.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Bring labels of other tools into COCO folders, or take them back; images stay as they are.

    Example:  sam3lora data convert exports/cracks datasets/cracks --from masks --names crack
    """
    from sam3lora.data.convert import convert_folder
    from sam3lora.data.report_tables import print_conversion

    report = convert_folder(
        source,
        target,
        source_format=source_format,
        target_format=target_format,
        names=names,
        instances=instances,
        components=components,
    )
    _show(report, print_conversion, json_path)


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="COCO folder; splits that it has are joined.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    fractions: Annotated[
        list[float] | None,
        typer.Option(metavar="F F [F]", help="Shares of train, valid and test; 0.8 0.1 0.1 if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same splits.")] = 0,
    group_by: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Regular expression; images whose names agree on it stay together."),
    ] = None,
    json_path: Json = None,
) -> None:
    """Divide a data set into splits that share no picture, with all categories near the fractions.

    Example:  sam3lora data split datasets/all datasets/potholes --fractions 0.8 0.1 0.1 --group-by "^(GX[0-9]+)_"
    """
    from sam3lora.data.report_tables import print_splitting
    from sam3lora.data.split.splitting import split_folder

    report = split_folder(source, target, fractions=fractions or (0.8, 0.1, 0.1), seed=seed, group_by=group_by)
    _show(report, print_splitting, json_path)


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="Folder to write train/ and valid/ into.", show_default=False)],
    num_train: Annotated[int, typer.Option(min=1, help="Training images.")] = 200,
    num_valid: Annotated[int, typer.Option(min=1, help="Validation images.")] = 50,
    num_test: Annotated[int, typer.Option(min=0, help="Held-out images; 0 = no test/.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 224,
    domain: Annotated[
        str, typer.Option(help='"shift" = objects the built-in tiny model has not seen, "base" = those it has.')
    ] = "shift",
) -> None:
    """Draw labelled scenes, to try things with no data of one's own.

    Example:  sam3lora data synth outputs/shapes --num-train 200 --num-valid 50
    """
    from sam3lora.data.synth.dataset import write_dataset

    write_dataset(
        folder, num_train=num_train, num_valid=num_valid, num_test=num_test, seed=seed, size=size, domain=domain
    )
    written = f"{num_train} training, {num_valid} validation and {num_test} held-out images"
    typer.echo(
        f"wrote {written if num_test else f'{num_train} training and {num_valid} validation images'} to {folder}"
    )


def _show(report: Any, print_report: Callable[[Any, Console], None], json_path: str | None) -> None:
    """Print the report as tables, and write it as JSON if asked; to standard output ("-") JSON alone."""
    from rich.console import Console

    if json_path != "-":
        print_report(report, Console())
    if json_path is None:
        return
    text = json.dumps(report.to_dict(), indent=2)
    if json_path == "-":
        typer.echo(text)
    else:
        path = Path(json_path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another --json") from None
