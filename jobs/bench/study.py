"""What the studies of training share: short runs of the preset `demo` in this process, and a table of means by way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from jobs.bench.recipes import interval
from jobs.bench.report import machine, machine_line, print_table
from sam3lora.config import Config, load_config


def short_run(folder: Path, data_dir: Path, seed: int, *overrides: str) -> Config:
    """Training on drawn images in this process, with a frozen vision tower, its validation images left out."""
    return load_config(
        "demo",
        [
            "lora.apply_to_vision_encoder=false",
            f"training.data_dir={data_dir}",
            f"output.output_dir={folder}",
            f"training.cache_dir={folder.parent / 'cache'}",
            f"training.seed={seed}",
            "data.valid_split=none",
            "scaling.num_workers=0",
            "logging.progress=off",
            "logging.plots=false",
            "training.warmup_steps=10",
            *overrides,
        ],
    )


@dataclass(frozen=True)
class StudyReport:
    """Values of every way of training and seed; each seed's runs differ in the way alone.

    `facts` say how they were trained.
    """

    title: str
    runs: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def values(self, way: str, name: str) -> list[float]:
        """In the order of the runs."""
        return [run[name] for run in self.runs if run["way"] == way]

    def print(self, console: Console) -> None:
        console.print(f"\n{self.title}\n", highlight=False)
        names = [name for name in self.runs[0] if name not in ("way", "seed")]
        ways = list(dict.fromkeys(run["way"] for run in self.runs))
        rows = [{"way": way} | {name: _text(self.values(way, name)) for name in names} for way in ways]
        for way in ways[1:]:
            pairs = {name: zip(self.values(way, name), self.values(ways[0], name), strict=True) for name in names}
            differences = {name: _text([mine - first for mine, first in pair]) for name, pair in pairs.items()}
            rows.append({"way": f"{way}, minus {ways[0]}"} | differences)
        print_table(rows, console)
        for name, value in self.facts.items():
            console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
        console.print(machine_line(), highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "machine": machine(), "facts": dict(self.facts), "runs": list(self.runs)}


def _text(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} +- {half:.3f}"


def run_study(
    ways: Mapping[str, Any],
    seeds: Sequence[int],
    num_train: int,
    num_valid: int,
    results: Path | None,
    measure: Callable[[Path, Path, int, Any], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Every way with every seed, which also draws the images. One thread each.

    Args:
        ways: Name -> what `measure` gets.
        num_train: Images of the drawn set; so is `num_valid`.
        results: A file to which each run is appended; runs that it holds are not repeated.
        measure: Called with the folder of the drawn set, one for the run, the seed and the way; returns its values.
    """
    from sam3lora.data.synth.dataset import write_dataset

    torch.set_num_threads(1)
    runs = read_runs(results)
    known = {(run["way"], run["seed"]) for run in runs}
    with TemporaryDirectory() as scratch:
        for seed in seeds:
            data = write_dataset(
                Path(scratch) / f"data{seed}", num_train=num_train, num_valid=num_valid, seed=seed, progress=False
            )
            for name, way in ways.items():
                if (name, seed) not in known:
                    values = measure(data, Path(scratch) / f"{len(runs)}", seed, way)
                    runs.append({"way": name, "seed": seed, **values})
                    _keep_run(results, runs[-1])
    return runs


def read_runs(results: Path | None) -> list[dict[str, Any]]:
    """Runs of an earlier call, which are not repeated: a line of JSON each."""
    if results is None or not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def _keep_run(results: Path | None, run: Mapping[str, Any]) -> None:
    if results is not None:
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run) + "\n")
