"""A whole run by several processes; as a script, one of them: ``worker_of_run.py CONFIG RANK WORLD_SIZE SCRATCH``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sam3lora.config import Config, load_config
from sam3lora.training.worker import run_worker


def train_on(config: Config, world_size: int, scratch: Path) -> None:
    """Train by so many processes with real collectives, in the configuration's run folder."""
    scratch.mkdir()
    Path(config.output.output_dir).mkdir(parents=True, exist_ok=True)
    (scratch / "config.yaml").write_text(config.to_yaml())
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(scratch / "config.yaml"), str(rank), str(world_size), str(scratch)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world_size, "\n".join(errors)


def main(config_file: str, rank: int, world_size: int, scratch: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{scratch / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    config = load_config(config_file)
    run_worker({"config": config.model_dump(mode="json"), "use_ray": False})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
