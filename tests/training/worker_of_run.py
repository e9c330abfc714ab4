"""A whole run by several processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from sam3lora.config import Config, load_config
from sam3lora.training.worker import run_worker

from .forked_workers import run_workers


def train_on(config: Config, world_size: int, scratch: Path) -> None:
    """Train by so many processes with real collectives, in the configuration's run folder."""
    scratch.mkdir()
    Path(config.output.output_dir).mkdir(parents=True, exist_ok=True)
    (scratch / "config.yaml").write_text(config.to_yaml())
    run_workers("worker_of_run", world_size, scratch)


def main(rank: int, world_size: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size)
    config = load_config(f"{scratch}/config.yaml")
    run_worker({"config": config.model_dump(mode="json"), "use_ray": False})
    dist.destroy_process_group()
