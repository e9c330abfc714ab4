"""What LoRA on the click head gains on drawn shapes that the built-in tiny model has not seen.

    python -m jobs.bench.click_adapter --output-dir outputs/click_adapter
    python -m jobs.bench.click_adapter --output-dir outputs/click_adapter --base FOLDER --seeds 1 --steps 4
    python -m jobs.bench.click_adapter --output-dir outputs/heavier_dice clicks.loss.dice=5

Trains with each seed on other images, and measures the base and every adapter on the same held-out ones: clicks by the
standard protocol, up to 10 an object. Prints a table in Markdown; about a minute of one core a seed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from jobs.bench.scripts import run_script
from sam3lora.config import load_config
from sam3lora.data.batch import to_pixel_values
from sam3lora.data.coco import CocoIndex
from sam3lora.data.sample import DecodeSettings, read_frame
from sam3lora.data.split_files import required_split
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.evaluation.clicks.meter import ClickMeter
from sam3lora.model.clicks.adapter import load_click_adapter
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.training.clicks.validator import click_on, users_of
from sam3lora.training.launch import train

MAX_CLICKS = 10
SHOWN = ("noc_80", "noc_85", "noc_90", "mean_iou_1", "mean_iou_3", "mean_iou_8", "nof_85")


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of data and runs; what is there already is used.")],
    base: Annotated[str, typer.Option(help="A base with a tracker.")] = "tiny",
    seeds: Annotated[int, typer.Option(help="Trainings.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of each, of 4 images.")] = 60,
    images: Annotated[int, typer.Option(help="Training images of each, and held-out images.")] = 40,
    changes: Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Of the configuration.")] = None,
) -> None:
    torch.set_num_threads(1)
    output_dir.mkdir(parents=True, exist_ok=True)
    held_out = _data(output_dir / "held_out", num_train=1, num_valid=images, seed=100)
    loaded = load_base(base)
    index = required_split(held_out, "valid").read("stop")
    plain = load_click_head(loaded)
    print(f"| | objects | {' | '.join(SHOWN)} | CPU s |\n|---|{'---:|' * (len(SHOWN) + 2)}")
    _row("base", _measure(plain, loaded, index), 0)
    for seed in range(seeds):
        data = _data(output_dir / f"data_{seed}", num_train=images, num_valid=1, seed=seed)
        run, started = output_dir / f"run_{seed}", time.process_time()
        overrides = [f"model.name={base}", f"training.data_dir={data}", f"output.output_dir={run}"]
        overrides += [f"training.seed={seed}", f"training.max_steps={steps}", "training.num_epochs=1000"]
        overrides += ["clicks.iterations=3", "evaluation.every_epochs=0", "evaluation.base_loss=false"]
        overrides += ["scaling.num_workers=0", "logging.progress=off", "logging.plots=false", *(changes or [])]
        result = train(load_config("clicks_quick_test", [*overrides, "training.eval_steps=100000"]))
        seconds = time.process_time() - started
        head = load_click_adapter(result.last_adapter, loaded, head=plain)
        _row(f"seed {seed}", _measure(head, loaded, index), seconds)


def _data(folder: Path, **settings: int) -> Path:
    return folder if folder.exists() else write_dataset(folder, domain="shift", progress=False, **settings)


@torch.no_grad()
def _measure(head: ClickHead, base: LoadedBase, index: CocoIndex) -> ClickMeter:
    meter, settings = ClickMeter(MAX_CLICKS), DecodeSettings(names=index.names, resolution=base.resolution)
    for row in range(len(index)):
        record = index.record(row)
        if users := users_of(record, MAX_CLICKS, max_objects=32):
            frame = np.array(read_frame(record, settings)[0])[None]
            pixels = to_pixel_values(frame, base.image_mean, base.image_std)
            tokens = base.model.vision_encoder.backbone(pixels).last_hidden_state
            click_on(users, head, head.embed(tokens), record, meter)
    return meter


def _row(name: str, meter: ClickMeter, seconds: float) -> None:
    values = meter.values()
    cells = [f"{values[key]:.3g}" for key in SHOWN]
    print(f"| {name} | {len(meter.runs)} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
