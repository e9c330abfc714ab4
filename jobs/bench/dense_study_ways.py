"""The ways of the dense study: how each is trained, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs.bench.dense_study_prompted import measure_semantic
from sam3lora.config import Config, load_config
from sam3lora.training.launch import train
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

PROMPTED = "prompted"
STEPS = {"none": 1600, "lora": 500, "bottleneck": 500, PROMPTED: 250}
"""Of each way; about five minutes of two cores, on 400 images."""

_COMMON = (
    "training.batch_size=8",
    "training.images_per_step=8",
    "training.num_epochs=10000",
    "training.mixed_precision=bf16",
    "training.weight_decay=0.01",
    "training.warmup_ratio=0.05",
    "training.logging_steps=50",
    "training.eval_steps=1000000",
    "evaluation.base_loss=false",
    "evaluation.every_epochs=10000",  # at the end
    "scaling.num_workers=0",
    "logging.progress=off",
    "logging.plots=false",
)
_FLIP = "data.horizontal_flip=0.5"
_LABELS = ("mean_iou", "mean_iou_foreground", "pixel_accuracy")


@dataclass(frozen=True)
class DenseRun:
    """One training; `cpu_s` are processor seconds of the process meanwhile, `wall_s` those of the clock.

    `semantic_mean_iou` is that of `validate --semantic`, of the prompted model alone.
    """

    data: str
    way: str
    seed: int
    steps: int
    wall_s: float
    cpu_s: float
    mean_iou: float
    mean_iou_foreground: float
    pixel_accuracy: float
    semantic_mean_iou: float | None = None


def measure(data_dir: Path, way: str, steps: int, seed: int, changes: Sequence[str] = ()) -> DenseRun:
    """Train one way and measure it; no step of the way `PROMPTED` is the base as it is."""
    with TemporaryDirectory() as scratch:
        config = configuration(data_dir, way, steps, seed, Path(scratch), changes)
        wall_s, cpu_s, adapter = time.perf_counter(), time.process_time(), None
        if steps:
            result = train(config)
            adapter, lines = result.last_adapter, read_metrics(result.output_dir / METRICS_FILE)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if way == PROMPTED:
            found: dict[str, Any] = measure_semantic(data_dir, adapter, _dense_configuration("none", changes).dense)
        else:
            last: dict[str, Any] = next(line for line in reversed(lines) if line.get("mean_iou") is not None)
            found = {name: last[name] for name in _LABELS}
    return DenseRun(data_dir.name, way, seed, steps, round(wall_s, 1), round(cpu_s, 1), **found)


def configuration(data_dir: Path, way: str, steps: int, seed: int, folder: Path, changes: Sequence[str]) -> Config:
    """That of a preset for the tiny model, of one way; pixels that an adapter sees are mirrored now and then."""
    own = {"training.max_steps": steps or None, "training.seed": seed, "training.data_dir": str(data_dir)}
    own |= {"output.output_dir": str(folder / "run"), "training.cache_dir": str(folder / "cache")}
    if way == PROMPTED:
        own["data.valid_split"] = "none"  # the semantic output is measured afterwards
        of_prompts = [change for change in changes if not change.startswith("dense.")]
        return load_config("demo", [*_COMMON, _FLIP, *of_prompts]).changed(own)
    return _dense_configuration(way, changes).changed(own)


def _dense_configuration(way: str, changes: Sequence[str]) -> Config:
    trunk = {"none": ["lora={}"], "lora": [_FLIP], "bottleneck": ["lora={}", _FLIP]}[way]
    return load_config("dense_quick_test", [*_COMMON, f"dense.adapter={way}", *trunk, *changes])
