"""Ways to adapt the trunk for dense prediction on one data set: foreground mIoU after so many steps, over seeds.

    python -m jobs.bench.dense_study outputs/scenes --steps none=1600 lora=500 bottleneck=500

Run it on `sam3lora data synth` scenes, or on any COCO data set with train/ and valid/. Rows are kept in the file of
`--results`: a call goes on where an earlier one has stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sam3lora.config import Config, load_config
from sam3lora.training.launch import train
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

WAYS = ("none", "lora", "bottleneck")
STEPS = {"none": 1600, "lora": 500, "bottleneck": 500}
"""What takes about five minutes of two cores each, on 400 images."""

COMMON = {
    "training.batch_size": 8,
    "training.images_per_step": 8,
    "training.num_epochs": 10_000,
    "training.mixed_precision": "bf16",
    "training.weight_decay": 0.01,
    "training.warmup_ratio": 0.05,
    "training.logging_steps": 50,
    "training.eval_steps": 10**6,
    "evaluation.base_loss": False,
    "evaluation.every_epochs": 10_000,  # at the end
    "scaling.num_workers": 0,
    "logging.progress": "off",
    "logging.plots": False,
}


@dataclass(frozen=True)
class DenseRun:
    """One training; `cpu_s` are processor seconds of the process meanwhile, `wall_s` those of the clock."""

    data: str
    way: str
    seed: int
    steps: int
    wall_s: float
    cpu_s: float
    mean_iou: float
    mean_iou_foreground: float
    pixel_accuracy: float


def configuration(data_dir: Path, way: str, steps: int, seed: int, folder: Path, changes: Sequence[str]) -> Config:
    """That of the preset for the tiny model, of one way; pixels that an adapter sees are mirrored now and then."""
    config = load_config(
        "dense_quick_test", [f"dense.adapter={way}", *([] if way == "lora" else ["lora={}"]), *changes]
    )
    own = {"training.max_steps": steps, "training.seed": seed, "training.data_dir": str(data_dir)}
    own |= {"output.output_dir": str(folder / "run"), "training.cache_dir": str(folder / "cache")}
    if way != "none":
        own["data.horizontal_flip"] = 0.5
    return config.changed(COMMON | own)


def measure(data_dir: Path, way: str, steps: int, seed: int, changes: Sequence[str] = ()) -> DenseRun:
    with TemporaryDirectory() as scratch:
        config = configuration(data_dir, way, steps, seed, Path(scratch), changes)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = train(config)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        lines = read_metrics(result.output_dir / METRICS_FILE)
    last: dict[str, Any] = next(line for line in reversed(lines) if line.get("mean_iou") is not None)
    found = {name: last[name] for name in ("mean_iou", "mean_iou_foreground", "pixel_accuracy")}
    return DenseRun(data_dir.name, way, seed, steps, round(wall_s, 1), round(cpu_s, 1), **found)


def table(runs: Sequence[DenseRun]) -> str:
    """Markdown: means over seeds with the smallest and largest value."""
    lines = [
        "| data | trunk | steps | minutes | mIoU | foreground mIoU | pixel accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, way in dict.fromkeys((run.data, run.way) for run in runs):
        own = [run for run in runs if (run.data, run.way) == (data, way)]
        minutes = statistics.mean(run.wall_s for run in own) / 60
        cells = [_spread([getattr(run, name) for run in own]) for name in ("mean_iou", "mean_iou_foreground")]
        accuracy = statistics.mean(run.pixel_accuracy for run in own)
        lines.append(f"| {data} | {way} | {own[0].steps} | {minutes:.1f} | {' | '.join(cells)} | {accuracy:.3f} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with train/ and valid/")
    parser.add_argument("--steps", nargs="+", default=[], metavar="WAY=STEPS", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=C", help="changes of the configuration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("outputs/dense_study.jsonl"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    steps = STEPS | {way: int(number) for way, _, number in (text.partition("=") for text in given.steps)}
    ways = [text.partition("=")[0] for text in given.steps] or list(WAYS)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    done = (
        [DenseRun(**json.loads(line)) for line in given.results.read_text().splitlines()]
        if given.results.exists()
        else []
    )
    for data_dir in given.data:
        for way in ways:
            for seed in range(1, given.seeds + 1):
                key = (data_dir.name, way, seed, steps[way])
                if key in [(run.data, run.way, run.seed, run.steps) for run in done]:
                    continue
                done.append(measure(data_dir, way, steps[way], seed, given.set))
                with given.results.open("a") as file:
                    file.write(json.dumps(asdict(done[-1])) + "\n")
                print(done[-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
