"""`sam3lora train`: train an adapter with a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from sam3lora.cli.shared_options import choose_gpus, gpu_indices
from sam3lora.cluster import check_job_path
from sam3lora.errors import UserError
from sam3lora.start_marks import mark


def train(
    config: Annotated[str, typer.Argument(help="A preset's name or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings to change.", show_default=False)
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that holds train/ and valid/.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="0 1 ...", help="GPUs of this machine to train on, or cpu.")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Training workers; 0 = in this process, without Ray.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    resume_anyway: Annotated[
        bool,
        typer.Option(
            "--resume-anyway", help="As --resume, also with other images, labels, seed or loss: the epoch begins again."
        ),
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to train on; a local Ray otherwise.")] = None,
) -> None:
    """Train an adapter.

    Example:  sam3lora train balanced --data-dir datasets/potholes lora.rank=8 --device 0 1
    """
    from sam3lora.config import load_config

    options = option_overrides(data_dir, output_dir, device, num_workers, address)
    settings = load_config(config, [*(overrides or []), *options])
    settings.training.required_data_dir()
    check_job_path(settings.output.output_dir, "--output-dir")
    if device:
        choose_gpus(device, settings.scaling.address)
    mark("settings")

    from sam3lora.training.launch import train as run

    run(settings, resume="anyway" if resume_anyway else resume)


def option_overrides(
    data_dir: str | None,
    output_dir: str | None,
    device: Sequence[str] | None,
    num_workers: int | None,
    address: str | None,
) -> list[str]:
    """Options of the command line as overrides `a.b=c`; they follow, and so replace, those that were typed."""
    values: dict[str, str | int | bool | None] = {
        "training.data_dir": data_dir,
        "output.output_dir": output_dir,
        "scaling.address": address,
        "scaling.num_workers": num_workers,
    }
    if device:
        gpus = gpu_indices(device)
        values["scaling.use_gpu"] = bool(gpus)
        if num_workers is None and gpus:
            values["scaling.num_workers"] = len(gpus)
        elif num_workers is not None and gpus and num_workers > len(gpus):
            raise UserError(f"--num-workers {num_workers} needs as many GPUs, --device names {len(gpus)}")
    return [f"{key}={_quoted(value)}" for key, value in values.items() if value is not None]


def _quoted(value: str | int | bool) -> str:
    """A value as YAML text; paths may hold colons, hashes and quotes."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower()
