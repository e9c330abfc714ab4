"""What the studies of training share: short runs of the preset `demo` in this process, and a table of means by way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.recipes import interval
from jobs.bench.report import machine, machine_line
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
        console.print(f"\n{self.title}", highlight=False)
        names = [name for name in self.runs[0] if name not in ("way", "seed")]
        table = Table("way", *names)
        ways = list(dict.fromkeys(run["way"] for run in self.runs))
        for way in ways:
            table.add_row(way, *(_text(self.values(way, name)) for name in names))
        for way in ways[1:]:
            pairs = {name: zip(self.values(way, name), self.values(ways[0], name), strict=True) for name in names}
            differences = [_text([mine - first for mine, first in pair]) for pair in pairs.values()]
            table.add_row(f"{way}, minus {ways[0]}", *differences)
        console.print(table)
        for name, value in self.facts.items():
            console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
        console.print(machine_line(), highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "machine": machine(), "facts": dict(self.facts), "runs": list(self.runs)}


def _text(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} +- {half:.3f}"


def read_runs(results: Path | None) -> list[dict[str, Any]]:
    """Runs of an earlier call, which are not repeated: a line of JSON each."""
    if results is None or not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def keep_run(results: Path | None, run: Mapping[str, Any]) -> None:
    if results is not None:
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run) + "\n")
