"""A training worker without Ray: ``python -m jobs.bench.drill.plain_worker CONFIG RANK NUM_WORKERS RENDEZVOUS``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sam3lora.config import load_config
from sam3lora.errors import RunFailed, UserError
from sam3lora.training.worker import run_worker


def main(config_file: str, rank: int, num_workers: int, rendezvous: Path) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_workers)
    config = load_config(config_file)
    try:
        run_worker({"config": config.model_dump(mode="json"), "use_ray": False})
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, RunFailed) else 2
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
