"""`--explain`: the trials that a sweep would train and what they cost. Nothing is started or written."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam3lora.cluster import ray_session
from sam3lora.data.split_files import required_split
from sam3lora.errors import UserError
from sam3lora.tune.estimate.sweep_cost import print_cost, print_vision
from sam3lora.tune.run.capacity import Concurrency, choose_concurrency, local_concurrency
from sam3lora.tune.run.checks import checked_data_dir, held_out_split
from sam3lora.tune.run.ledger import Rejection
from sam3lora.tune.search.early_stopping import rungs
from sam3lora.tune.search.proposals import Proposal, propose_all
from sam3lora.tune.space.component_sets import COMPONENTS_KEY
from sam3lora.tune.space.parameters import Choice, value_text
from sam3lora.tune.space.search_space import SearchSpace

_MOST_ROWS, _MOST_REASONS = 12, 3


def explain_sweep(
    space: SearchSpace, *, probe: bool = True, address: str | None = None, console: Console | None = None
) -> None:
    """Print what would be tried and what it costs.

    Args:
        probe: Measure time and memory with two steps of the base configuration and two of the largest sample. It needs
            a data folder.
        address: Ray cluster that the sweep would run on; without one no Ray is started.

    Raises:
        UserError: No sample can be trained, the data are wrong, or no cluster answers.
    """
    width = None if Console().is_terminal else 160
    console = console or Console(markup=False, highlight=False, soft_wrap=True, width=width)
    data_dir = None if space.base.training.data_dir is None else checked_data_dir(space)
    proposals, rejections = propose_all(space)
    concurrency, where = _concurrency(space, address)
    _print_subject(space, data_dir, console)
    _print_parameters(space, console)
    _print_search(space, console)
    _print_samples(space, proposals, console)
    _print_rejections(rejections, console)
    print_vision(space, proposals, data_dir, console)
    at_a_time = _count(min(concurrency.trials, len(proposals)), "trial")
    console.print(f"\nAt a time   {at_a_time} {where} ({concurrency.reason})")
    if data_dir is None:
        console.print("Cost        not measured: name the images with --data-dir DIR")
    elif not probe:
        console.print("Cost        not measured: leave out --no-probe")
    else:
        print_cost(space, proposals, concurrency, console)


def _concurrency(space: SearchSpace, address: str | None) -> tuple[Concurrency, str]:
    """Trials at a time, and where."""
    asked = space.search.max_concurrent
    address = address or space.base.scaling.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return local_concurrency(space.base, asked), "on this machine"
    with ray_session(address, num_cpus=0):
        return choose_concurrency(space.base, asked), f"on the cluster {address}"


def _print_subject(space: SearchSpace, data_dir: Path | None, console: Console) -> None:
    base, lora = space.base, space.base.lora
    length = _count(base.training.num_epochs, "epoch")
    if base.training.max_steps:
        length += f", at most {_count(base.training.max_steps, 'step')}"
    console.print(f"Sweep       {space.name}: {_count(space.num_trials, 'trial')} of {length}")
    adapted = "the click head" if base.task == "clicks" else ", ".join(lora.components)
    where = f", on {adapted}" if adapted else ""
    console.print(f"Base        {space.base_name} ({base.model.name}): rank {lora.rank}, alpha {lora.alpha:g}{where}")
    if data_dir is None:
        console.print("Data        not named yet: --data-dir DIR, the folder that holds train/ and valid/")
        return
    at_end = "no split is held out: the best value is an optimistic one"
    try:
        held_out = held_out_split(space)
        if held_out is not None:
            at_end = f"base and best are measured on {held_out.name}/ at the end"
    except UserError as error:
        at_end = f"{at_end} ({error})"
    train, valid = (
        required_split(data_dir, split, base.data.annotation_file).name
        for split in (base.data.train_split, base.data.valid_split)
    )
    console.print(f"Data        {data_dir}: trained on {train}/, chosen on {valid}/; {at_end}")


def _print_parameters(space: SearchSpace, console: Console) -> None:
    table = Table("parameter", "kind", "values", "base", box=None, pad_edge=False, header_style="bold")
    base = space.base_values()
    for key, parameter in space.parameters.items():
        table.add_row(key, parameter.kind, parameter.describe(), space.label(key, base[key]))
    console.print()
    console.print(table)
    for key, parameter in space.parameters.items():
        if key == COMPONENTS_KEY and isinstance(parameter, Choice):
            names = {name: ", ".join(space.components_of(name)) for name in parameter.values}
        elif isinstance(parameter, Choice) and parameter.labels:
            names = {parameter.label(value): value_text(value) for value in parameter.values}
        else:
            continue
        console.print("\n".join(["", f"{key}:", *(f"  {name} = {meaning}" for name, meaning in names.items())]))
    bounds = []
    if space.constraints.max_trainable_parameters is not None:
        bounds.append(f"{space.constraints.max_trainable_parameters:,} trainable parameters")
    if space.constraints.max_adapter_mb is not None:
        bounds.append(f"{space.constraints.max_adapter_mb:g} MB an adapter")
    console.print(f"\nBounds      {'at most ' + ' and '.join(bounds) if bounds else 'none'}")


def _print_search(space: SearchSpace, console: Console) -> None:
    search, stops = space.search, rungs(space)
    first = "; trial 0 is the base configuration" if search.include_base else ""
    console.print(f"Search      {search.algorithm}, seed {search.seed}{first}")
    low_or_high = "lowest" if search.mode == "min" else "highest"
    also = ", with few trainable parameters as second objective" if search.objective == "quality_and_size" else ""
    every = "epoch" if search.every_epochs == 1 else f"{search.every_epochs} epochs"
    how_often = "" if search.metric == "valid_loss" else f", measured every {every}"
    console.print(f"Best        {low_or_high} {search.metric}{how_often}{also}")
    if stops:
        epochs = ", ".join(map(str, stops))
        factor = space.early_stopping.reduction_factor
        console.print(f"Stopping    ASHA compares after epoch {epochs}: about one trial of {factor} goes on")
    else:
        console.print("Stopping    none: every trial is trained whole")


def _print_samples(space: SearchSpace, proposals: list[Proposal], console: Console) -> None:
    title = "the first samples; later ones depend on results" if space.search.algorithm == "optuna" else "the samples"
    keys = list(space.parameters)
    table = Table("trial", *(key.rpartition(".")[2] for key in keys), "parameters", box=None, pad_edge=False)
    for proposal in proposals[:_MOST_ROWS]:
        name = f"{proposal.number} base" if proposal.is_base else str(proposal.number)
        values = [space.label(key, proposal.values[key]) for key in keys]
        table.add_row(name, *values, f"{proposal.trainable_parameters:,}")
    console.print(f"\n{title}:")
    console.print(table)
    if len(proposals) > _MOST_ROWS:
        console.print(f"... and {len(proposals) - _MOST_ROWS} more")
    if len(proposals) < space.num_trials:
        console.print(f"There are only {len(proposals)} different ones, fewer than the {space.num_trials} asked for.")
    counts = [proposal.trainable_parameters for proposal in proposals]
    between = f"{min(counts):,} to {max(counts):,} parameters, median {round(statistics.median(counts)):,}"
    console.print(f"\nTrainable   {between if min(counts) < max(counts) else f'{counts[0]:,} parameters'}")


def _print_rejections(rejections: list[Rejection], console: Console) -> None:
    kinds = Counter(rejection.kind for rejection in rejections)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(f"Rejected    {listed or 'none'}")
    reasons = Counter(rejection.reason for rejection in rejections if rejection.kind != "already tried")
    for reason, count in reasons.most_common(_MOST_REASONS):
        console.print(f"            {count} x {reason}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
