"""The cost part of `--explain`: vision features, time, memory and disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sam3lora.config import Config
from sam3lora.data.coco_file import count_listed_images
from sam3lora.data.split_files import required_split
from sam3lora.errors import RunFailed
from sam3lora.model.staged.trunk import unchanged_layers
from sam3lora.training.features.codec import FeatureForm
from sam3lora.training.features.trunk_cache import kept_type, why_trunk_changes
from sam3lora.tune.estimate import probe as probing
from sam3lora.tune.estimate.dense_size import num_kept_layers
from sam3lora.tune.estimate.parameter_budget import adapted_modules, trunk_of
from sam3lora.tune.estimate.probe import Probe
from sam3lora.tune.estimate.sweep_time import duration, sweep_time
from sam3lora.tune.run.capacity import Concurrency
from sam3lora.tune.search.early_stopping import rungs
from sam3lora.tune.search.proposals import Proposal
from sam3lora.tune.space.search_space import SearchSpace, adapter_mb

_COPIES_ON_DISK = 5
"""Copies of a trial's adapter: best/, last/, and a checkpoint with the two moments of AdamW."""


def print_vision(space: SearchSpace, proposals: list[Proposal], data_dir: Path | None, console: Console) -> None:
    """Print how many trials keep their vision features, and whether these fit into the cache."""
    reasons = [(proposal.config, why_not_kept(proposal.config)) for proposal in proposals]
    kept = [config for config, why in reasons if why is None]
    kept_back = Counter(why for _, why in reasons if why is not None)
    others = "".join(f"; {count} not: {why}" for why, count in kept_back.items())
    console.print(f"Vision      features are computed once and kept for {len(kept)} of {len(reasons)} trials{others}")
    if not kept or data_dir is None:
        return
    number, size_mb = _num_images(space, data_dir), feature_bytes(kept) / 1e6
    room_mb = 1000 * space.base.training.cache_gb
    if number * size_mb > room_mb:
        console.print(
            f"            those of {number:,} images take {_megabytes(number * size_mb)} ({size_mb:.3g} MB each), more "
            f"than training.cache_gb = {room_mb / 1000:g}: every epoch computes the rest anew unless that is raised"
        )


def _num_images(space: SearchSpace, data_dir: Path) -> int:
    data = space.base.data
    splits = (data.train_split, data.valid_split)
    files = {required_split(data_dir, split, data.annotation_file).annotation_file for split in splits}
    return sum(map(count_listed_images, files))


def print_cost(space: SearchSpace, proposals: list[Proposal], concurrency: Concurrency, console: Console) -> None:
    """Probe the base configuration and the largest sample, and print an estimate for the sweep."""
    largest = max(proposals, key=lambda proposal: proposal.trainable_parameters)
    base_values = space.base_values()
    subjects = {"base configuration": space.trial_config(base_values, "probe")}
    if largest.values != base_values:
        subjects[f"largest (trial {largest.number})"] = space.trial_config(largest.values, "probe")
    probes: dict[str, tuple[Config, Probe]] = {}
    try:
        for name, config in subjects.items():
            found = probing.run_probe(config)
            # Only the first probe loads the libraries, but every trial does.
            start_s = max(found.start_s, *(probe.start_s for _, probe in probes.values()), 0.0)
            probes[name] = (config, replace(found, start_s=start_s))
    except RunFailed as error:
        console.print(f"Cost        not known: the probe of the {name} failed: {error}")
        return
    _print_probes(probes, console)
    _print_estimate(space, proposals, concurrency, list(probes.values()), console)


def _print_probes(probes: dict[str, tuple[Config, Probe]], console: Console) -> None:
    first = next(iter(probes.values()))[1]
    columns = ("start", "training", "validation", "metrics", "peak memory")
    table = Table("", *columns, "vision", box=None, pad_edge=False, header_style="bold")
    for name, (config, probe) in probes.items():
        workers = probing.data_workers(config)
        table.add_row(
            name,
            f"{probe.start_s:.1f} s",
            f"{probe.train.seconds(workers):.3f} s per image",
            f"{probe.valid.seconds(workers):.3f} s per image",
            "-" if probe.metrics_s is None else f"{probe.metrics_s:.3f} s per image",
            f"{probe.memory_mb:,.0f} MB",
            "from the cache" if probe.uses_features else "computed",
        )
    console.print(
        f"\nMeasured on {first.device}; a trial takes {first.num_train} training and {first.num_valid} validation "
        "images:"
    )
    console.print(table)


def _print_estimate(
    space: SearchSpace,
    proposals: list[Proposal],
    concurrency: Concurrency,
    probes: list[tuple[Config, Probe]],
    console: Console,
) -> None:
    number, stops, factor = len(proposals), rungs(space), space.early_stopping.reduction_factor
    at_a_time = min(concurrency.trials, number)
    found = sweep_time(probes, num_trials=number, at_a_time=at_a_time, rungs=stops, reduction_factor=factor)
    low, high = map(duration, found.trial_s)
    console.print(f"\nA trial     {low if low == high else f'{low} to {high}'}")
    early = f"; about {duration(found.about_s)} with early stopping ({found.share:.0%} of the epochs)" if stops else ""
    console.print(f"The sweep   at most {duration(found.at_most_s)}, {at_a_time} at a time{early}")
    parameters = sum(proposal.trainable_parameters for proposal in proposals)
    adapters_mb = _COPIES_ON_DISK * adapter_mb(parameters)
    images = probes[0][1].num_train + probes[0][1].num_valid
    cache_mb = max(probe.cache_bytes for _, probe in probes) * images / 1e6
    console.print(
        f"Disk        {_megabytes(adapters_mb)} in the sweep folder, {_megabytes(cache_mb)} of cached images and "
        f"features (at most training.cache_gb = {space.base.training.cache_gb:g} GB)"
    )


def _megabytes(size_mb: float) -> str:
    return f"{size_mb / 1000:.1f} GB" if size_mb >= 1000 else f"{size_mb:.0f} MB"


def why_not_kept(config: Config) -> str | None:
    """Why every epoch computes the vision features anew; None if they are kept."""
    if config.training.feature_cache is False:
        return "training.feature_cache is false"
    trunk, adapted = trunk_of(config), adapted_modules(config)
    if config.task == "dense" and not num_kept_layers(config, adapted, trunk):
        return "the adapter changes the vision trunk"
    reason = why_trunk_changes(config, adapted, trunk.config)
    if reason is not None:
        return reason.partition(" (")[0]
    if config.data.augmentation != "none" or config.data.horizontal_flip or config.data.vertical_flip:
        return "the training images are augmented"
    return None


def feature_bytes(configs: Iterable[Config]) -> int:
    """Bytes per image of the features of trials that keep them; trials that share features count once."""
    sizes: dict[tuple[Any, ...], int] = {}
    for config in configs:
        model, bf16 = config.model, config.training.mixed_precision != "no"
        trunk = trunk_of(config).config
        tokens = ((model.resolution or _side(trunk.image_size)) // _side(trunk.patch_size)) ** 2
        adapted, weights = adapted_modules(config), getattr(torch, model.dtype)
        num_layers = unchanged_layers(adapted, trunk.num_hidden_layers)
        kind = torch.float32 if bf16 else weights
        if config.task == "dense":
            tokens *= num_kept_layers(config, adapted, trunk_of(config))
        elif num_layers == trunk.num_hidden_layers:
            kind = kept_type(adapted, bf16=bf16, weights=weights)
        form = FeatureForm((tokens, trunk.hidden_size), kind, config.training.feature_cache_type == "int8")
        base = (model.name, model.revision, model.resolution, model.dtype, model.attention)
        shared = (*base, bf16, num_layers, config.dense.layers, form)
        sizes[shared] = form.num_bytes
    return sum(sizes.values())


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])
