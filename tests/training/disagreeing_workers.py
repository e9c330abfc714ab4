"""Workers whose hosts differ.

``SCRATCH/cases.json`` has the configuration and the cases, with what is special on each worker. What comes of each
case is written to ``SCRATCH/outcomes_RANK.json``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from sam3lora.config import load_config
from sam3lora.errors import UserError
from sam3lora.training import agreement, setup, trainer
from sam3lora.training.datasets import read_splits
from sam3lora.training.trainer import Trainer


@contextlib.contextmanager
def host(
    name: str,
    *,
    data_dir: str | None = None,
    base: str | None = None,
    rank: int | None = None,
    hidden: str = "",
    hidden_s: float = 0,
    seed: int = 0,
) -> Iterator:
    """A host of this name, which may have other data, another base, an adapter of another rank, see a checkpoint late
    (or several: the start of their names), or draw other random numbers."""
    is_file, manual_seed, seen_s = Path.is_file, torch.manual_seed, time.monotonic() + hidden_s

    def late(path: Path) -> bool:
        return is_file(path) and not (hidden and path.parent.name.startswith(hidden) and time.monotonic() < seen_s)

    def read(config):
        return read_splits(config.changed({"training.data_dir": data_dir}) if data_dir else config)

    find_base, add_adapter = setup.find_base_model, setup.add_adapter

    def find_other_base(config):
        return find_base(config.changed({"model.name": base}) if base else config)

    def add_other_adapter(config, *arguments):
        return add_adapter(config.changed({"lora.rank": rank}) if rank else config, *arguments)

    with (
        patch.object(setup, "find_base_model", find_other_base),
        patch.object(setup, "add_adapter", add_other_adapter),
        patch.object(agreement.socket, "gethostname", lambda: name),
        patch.object(Path, "is_file", late),
        patch.object(trainer, "read_splits", read),
        patch.object(torch, "manual_seed", lambda value: manual_seed(value + seed)),
    ):
        yield


def outcome(config, case: dict[str, Any]) -> dict[str, Any]:
    """Where the worker begins and with which weights, or what it says."""
    try:
        with host(**case["host"]):
            if "longest_wait_s" in case:
                root = Path(case["folder"]) / "checkpoints"
                chosen = agreement.choose_checkpoint(root, case.get("known"), longest_wait_s=case["longest_wait_s"])
                return {"chosen": chosen and chosen.name}
            run = Trainer(config, Path(case["folder"]), use_ray=False)
    except UserError as error:
        return {"error": str(error)}
    weights = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    return {"step": run.state.step, "weights": sum(weight.double().abs().sum().item() for weight in weights)}


def main(rank: int, world_size: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size)
    content = json.loads(Path(scratch, "cases.json").read_text())
    config = load_config(content["config"])
    outcomes = {name: outcome(config, workers[rank]) for name, workers in content["cases"].items()}
    Path(scratch, f"outcomes_{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
