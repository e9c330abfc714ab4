"""`sam3lora tune`: search for the best settings, or explain what a sweep would try and cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3lora.cli.shared_options import check_output_folder, choose_gpus
from sam3lora.cli.train import option_overrides
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.tune.run.sweep import SweepResult


def tune(
    space: Annotated[str, typer.Argument(help="A shipped search space's name or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=c]...", help="Settings of the base configuration to change.", show_default=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Base configuration instead of the space's: a preset's name or a YAML file.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that holds train/ and valid/.")] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Folder of the sweep (default: outputs/<name of the space>).")
    ] = None,
    num_trials: Annotated[
        int | None,
        typer.Option(
            "--num-trials", "--num-samples", min=1, help="Trials to train, the base configuration among them."
        ),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(metavar="NAME", help="random, grid or optuna.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="valid_loss, or map, bbox_map, cgf1; with task dense mean_iou; clicks: noc_85, mean_iou_3 and so on.",
        ),
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time (default: as many as there is room for).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in the folder; --num-trials may be larger.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: do failed trials again as well.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what would be tried and what it costs, and train nothing.")
    ] = False,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="With --explain: do without the two steps that measure time and memory.")
    ] = False,
    device: Annotated[
        list[str] | None, typer.Option(metavar="0 1 ...", help="GPUs of this machine to train on, or cpu.")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Training workers of each trial; 0 = one process without Ray Train.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to work on; a local Ray otherwise.")] = None,
) -> None:
    """Search for the settings that work best on a data set.

    Example:  sam3lora tune lora_quick --data-dir datasets/potholes --num-trials 8
    """
    if no_probe and not explain:
        raise UserError("--no-probe has no effect without --explain: add it, or leave --no-probe out")
    if retry_failed and not resume:
        raise UserError("--retry-failed has no effect without --resume: add it, or leave --retry-failed out")
    from sam3lora.tune.space.reader import load_space

    search_space = load_space(
        space,
        config=config,
        overrides=[*(overrides or []), *_trial_options(data_dir, device, num_workers, address)],
        num_trials=num_trials,
        algorithm=algorithm,
        metric=metric,
        max_concurrent=max_concurrent,
    )
    if device:
        choose_gpus(device, search_space.base.scaling.address)
    if explain:
        from sam3lora.tune.estimate.explain import explain_sweep

        explain_sweep(search_space, probe=not no_probe, address=address)
        return
    folder = output_dir or f"outputs/{search_space.name}"
    search_space.base.training.required_data_dir()
    check_output_folder(folder, "--output-dir")
    from sam3lora.tune.run.sweep import run_sweep

    result = run_sweep(search_space, Path(folder), resume=resume, retry_failed=retry_failed, address=address)
    _print_result(result, search_space.search.metric)


def _trial_options(
    data_dir: str | None, device: list[str] | None, num_workers: int | None, address: str | None
) -> list[str]:
    """Options as overrides of the base configuration.

    All trials share the GPUs of `--device 0 1`, so that option does not set the number of workers of each trial.
    """
    options = option_overrides(data_dir, None, device, num_workers, address)
    if num_workers is None:
        options = [option for option in options if not option.startswith("scaling.num_workers=")]
    return options


def _print_result(result: SweepResult, metric: str) -> None:
    from rich.console import Console

    from sam3lora.tune.report.sentences import held_out_sentence

    console = Console(markup=False, soft_wrap=True, highlight=False)
    best, base = result.best, result.base
    folder = shlex.quote(_short(result.sweep_dir))
    if best is not None:
        against = ""
        if base is not None and base.number != best.number:
            against = f", the base configuration {base.value:.4g}"
        what = "the base configuration" if best.is_base else f"trial {best.number}"
        console.print(f"best: {what} with {metric} {best.value:.4g}{against}")
        console.print(f"held out  {held_out_sentence(result.summary.get('held_out'))}")
        console.print(f"adapter   {folder}/best")
        console.print(f"again     sam3lora train {folder}/best/config.yaml --output-dir DIR")
    console.print(f"report    {_short(result.report)}")


def _short(path: Path) -> str:
    """Relative to the working directory, if it is in there."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
