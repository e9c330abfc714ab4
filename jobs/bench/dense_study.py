"""Ways to adapt the trunk for dense prediction on one data set: foreground mIoU after so many steps, over seeds.

    python -m jobs.bench.dense_study outputs/scenes --steps none=1600 lora=500 bottleneck=500

The ways are a frozen trunk (`none`), LoRA or bottlenecks in it, each with a dense head, and the semantic output of the
prompted model with LoRA (`prompted`; `prompted=0` is the base as it is). Run it on `sam3lora data synth` scenes, or on
any COCO data set with train/ and valid/. Rows are kept in the file of `--results`: a call goes on where an earlier one
has stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from jobs.bench.dense_study_ways import PROMPTED, STEPS, DenseRun, measure


def table(runs: Sequence[DenseRun]) -> str:
    """Markdown: means over seeds with the smallest and largest value."""
    lines = [
        "| data | way | steps | seeds | processor minutes | mIoU | foreground mIoU | pixel accuracy |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    for data, way, steps in dict.fromkeys((run.data, run.way, run.steps) for run in runs):
        own = [run for run in runs if (run.data, run.way, run.steps) == (data, way, steps)]
        minutes = statistics.mean(run.cpu_s for run in own) / 60
        measured = [_spread([getattr(run, name) for run in own]) for name in ("mean_iou", "mean_iou_foreground")]
        accuracy = statistics.mean(run.pixel_accuracy for run in own)
        cells = [data, way, f"{steps}", f"{len(own)}", f"{minutes:.1f}", *measured, f"{accuracy:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _way_and_steps(text: str) -> tuple[str, int]:
    way, _, number = text.partition("=")
    lowest = 0 if way == PROMPTED else 1
    if way not in STEPS or not number.isdecimal() or int(number) < lowest:
        raise argparse.ArgumentTypeError(f"expected WAY=STEPS of {', '.join(STEPS)}, at least {lowest}, got {text!r}")
    return way, int(number)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with train/ and valid/")
    parser.add_argument(
        "--steps", nargs="+", type=_way_and_steps, default=[], metavar="WAY=STEPS", help=f"of {', '.join(STEPS)}"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=C", help="changes of the configuration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("outputs/dense_study.jsonl"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    steps = dict(given.steps) or STEPS
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    done = [DenseRun(**json.loads(line)) for line in lines]
    for data_dir in given.data:
        for way, number in steps.items():
            for seed in range(1, (given.seeds if number else 1) + 1):
                key = (data_dir.name, way, seed, number)
                if key in [(run.data, run.way, run.seed, run.steps) for run in done]:
                    continue
                done.append(measure(data_dir, way, number, seed, given.set))
                with given.results.open("a") as file:
                    file.write(json.dumps(asdict(done[-1])) + "\n")
                print(done[-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
