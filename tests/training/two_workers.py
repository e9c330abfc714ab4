"""A recorded optimizer step, also of two workers; as a script, one of them: ``two_workers.py CONFIG RANK SCRATCH``."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sam3lora.config import Config, load_config
from sam3lora.training.trainer import Trainer
from sam3lora.training.update import NonFiniteLoss, optimizer_step


@dataclass
class RecordedStep:
    """What the optimizer was given, and what was logged."""

    gradients: dict[str, Tensor]
    terms: dict[str, float]
    image_ids: list[int]


def make_trainer(config: Config) -> Trainer:
    """A worker whose adapter has learned something: with B = 0 the gradient of A is zero."""
    folder = Path(config.output.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder, use_ray=False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def recorded_step(trainer: Trainer) -> RecordedStep:
    """The first step of the run, recorded where the optimizer would move the weights."""
    gradients: dict[str, Tensor] = {}

    def record() -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    trainer.optimizer.step = record
    group = list(islice(trainer.batches.training_batches(0, 0), trainer.batches.forwards_per_step))
    terms, _, _ = optimizer_step(trainer, group)
    return RecordedStep(gradients, terms, [number for batch in group for number in batch.image_ids.tolist()])


def main(rank: int, world_size: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size)
    trainer = make_trainer(load_config(f"{scratch}/config.yaml"))
    step = recorded_step(trainer)
    save_file(step.gradients, f"{scratch}/gradients_{rank}.safetensors")
    valid = trainer.validator.loss_terms()
    # Only the second worker hears that it has to end.
    with trainer.notices.listening():
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        recorded_step(trainer)
    metrics = trainer.validator.metrics()
    report = {
        "metrics": metrics,
        "terms": step.terms,
        "image_ids": step.image_ids,
        "valid": valid.means(),
        "valid_loss": valid.loss(),
        "run_ends": trainer.notices.run_ends,
    }

    # Only the second worker meets a loss that is not finite.
    if rank == 1:
        criterion = trainer.runner.criterion

        def broken(*arguments):
            output = criterion(*arguments)
            output.total = output.total * torch.nan
            return output

        broken.weights, broken.begin = criterion.weights, criterion.begin
        trainer.runner.criterion = broken
    try:
        recorded_step(trainer)
    except NonFiniteLoss as error:
        report["failure"] = str(error)
    Path(scratch, f"report_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[2]), 2, sys.argv[3])
