"""The whole training of the tiny base's click head: draw scenes, encode them, train, measure, write the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from jobs.pretrain.bank import build_bank
from jobs.pretrain.click_head import first_click_head, save_both_halves
from jobs.pretrain.click_measure import ClickReport, measure_click_head
from jobs.pretrain.click_scenes import ClickScenes
from jobs.pretrain.click_stage import ClickStage, train_clicks
from jobs.pretrain.snapshot import Snapshot
from sam3lora.model.base_folder import find_base
from sam3lora.model.loading import load_base


@dataclass(frozen=True)
class ClickRunSettings:
    """Everything that decides the result."""

    scenes: int = 6000
    dense_scenes: int = 4000
    held_out_scenes: int = 150
    stage: ClickStage = field(default_factory=ClickStage)


def pretrain_clicks(
    output_dir: Path, settings: ClickRunSettings, *, log: Callable[[str], None] = print, workers: int = 2
) -> ClickReport:
    """Train on the base `tiny` and write `output_dir/tiny`; goes on where an earlier call was cut."""
    output_dir.mkdir(parents=True, exist_ok=True)
    base, seed = load_base("tiny"), settings.stage.seed

    def drawn(name: str, count: int, seed: int, dense: bool = False) -> ClickScenes:
        bank = build_bank(output_dir / name, count, seed=seed, dense=dense, workers=workers)
        return ClickScenes.open(bank, base, output_dir / f"{name}.safetensors")

    scenes = drawn("scenes", settings.scenes, seed + 501)
    dense = drawn("dense", settings.dense_scenes, seed + 502, dense=True)
    held_out = drawn("held_out", settings.held_out_scenes, seed + 599)
    torch.manual_seed(seed)
    head = first_click_head(base, held_out.tokens_ISC[:16])
    train_clicks(
        head,
        [(scenes, 0.6), (dense, 0.4)],
        settings.stage,
        log=log,
        snapshot=Snapshot(output_dir / "clicks.safetensors", {"head": head}),
        check=lambda: measure_click_head(head, held_out, num_scenes=min(40, len(held_out)), max_clicks=8).line(),
    )
    head.half().float().eval()  # as it is saved
    report = measure_click_head(head, held_out)
    save_both_halves(find_base("tiny"), head, output_dir / "tiny")
    summary = {"settings": asdict(settings), "report": asdict(report)}
    (output_dir / "clicks.json").write_text(json.dumps(summary, indent=2) + "\n")
    return report
