"""The cost of training on several workers: two workers beside two independent processes, and the collective calls of a
step among up to sixteen.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from jobs.bench.collectives import time_collectives
from jobs.bench.processes import Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from jobs.bench.training_work import TrainingWork
from sam3lora.data.batch import Batch
from sam3lora.errors import UserError
from sam3lora.training import distributed
from sam3lora.training.step import StepCounts

TOGETHER, APART, ALONE = "2 workers", "2 processes on their own", "1 process"


@dataclass(frozen=True)
class ScalingWork:
    """What each process does in a round: `num_steps` steps of one image with `num_prompts` prompts."""

    preset: str = "light"
    model: str = "small"
    num_prompts: int = 4
    num_steps: int = 2

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps must be positive, got {self.num_steps}")
        _ = self.training.config  # a preset that does not exist is told before any process starts

    @property
    def training(self) -> TrainingWork:
        return TrainingWork(self.preset, model=self.model, num_prompts=self.num_prompts, dropout=0.0)


def compare_scaling(
    work: ScalingWork | None = None, *, rounds: int = 3, simulated: Sequence[int] = (2, 4, 8, 16)
) -> BenchReport:
    """Two one-thread workers beside two one-thread processes with the same work; then what larger numbers would cost.

    A worker's step is that of training: counts of all workers, forward and backward, gradients averaged, clipping,
    AdamW. Processes on their own do the same without the exchange. For larger numbers the collective calls of a step
    are timed among so many processes on this machine, which share its processors: a step is predicted as that of two
    processes beside each other plus those calls.

    Args:
        work: Of each process.
        rounds: Measured; the median counts.
        simulated: Numbers of workers whose collective calls are timed.

    Raises:
        UserError: A number that is too small, or no such model.
    """
    work = work or ScalingWork()
    if rounds < 1 or min(simulated, default=2) < 2:
        raise UserError(f"rounds must be positive and simulated workers at least 2, got {rounds} and {[*simulated]}")
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            TOGETHER: Work(make_processes, {"work": work, "count": 2, "meeting": f"file://{folder}/rendezvous"}),
            APART: Work(make_processes, {"work": work, "count": 2}),
            ALONE: Work(make_processes, {"work": work, "count": 1}),
        }
        found = measure_in_turns(ways, rounds=rounds, num_threads=1)
    step_s = {name: way.median / work.num_steps for name, way in found.items()}
    last = {name: way.results[-1] for name, way in found.items()}
    size = last[TOGETHER][0]["gradient_bytes"]
    facts: dict[str, Any] = {
        "images/s, 2 workers": round(2 / step_s[TOGETHER], 3),
        "images/s, 2 processes on their own": round(2 / step_s[APART], 3),
        "2 workers / 2 processes on their own": round(step_s[APART] / step_s[TOGETHER], 3),
        "2 processes on their own / twice 1 process": round(step_s[ALONE] / step_s[APART], 3),
        "gradients, MB": round(size / 1e6, 2),
        "2 workers hold the same weights": len({result["weights"] for result in last[TOGETHER]}) == 1,
        "2 processes on their own hold the same weights": len({result["weights"] for result in last[APART]}) == 1,
    }
    for count in simulated:
        calls_s = time_collectives(count, size)
        facts[f"collective calls of a step among {count}, ms"] = {
            name: round(1000 * seconds, 2) for name, seconds in calls_s.items()
        }
        efficiency = step_s[APART] / (step_s[APART] + sum(calls_s.values()))
        facts[f"predicted: {count} workers / as many processes on their own"] = round(efficiency, 3)
    return BenchReport(
        title=f"A step of the {work.preset} preset, {work.model} model, an image with {work.num_prompts} prompts for "
        "each process of one thread",
        ways=[Timing(name, seconds) for name, seconds in step_s.items()],
        facts=facts,
    )


def make_processes(work: ScalingWork, count: int, meeting: str | None = None) -> Round:
    """A round lets all processes train at the same time, and ends with the last of them.

    Args:
        work: Of each process.
        count: Number of processes.
        meeting: Where they form a group; None leaves each on its own.
    """
    multiprocessing.current_process().daemon = False  # else it may have no children
    context = multiprocessing.get_context("spawn")
    ends = []
    for rank in range(count):
        here, there = context.Pipe()
        group = (meeting, rank, count) if meeting else None
        context.Process(target=_train, args=(there, work, rank, group), daemon=True).start()
        there.close()
        ends.append(here)

    def ask() -> list[Any]:
        for end in ends:
            end.send("go")
        return [end.recv() for end in ends]

    ask()  # all of them are set up
    return ask


def _train(end: Connection, work: ScalingWork, rank: int, group: tuple[str, int, int] | None) -> None:
    torch.set_num_threads(1)
    if group is not None:
        method, rank, count = group
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    training = work.training
    step = make_step(training, training.adapted_model(), training.batch(first_image=rank))
    while True:
        try:
            end.recv()
        except EOFError:
            return
        for _ in range(work.num_steps - 1):
            step()
        end.send(step())


def make_step(work: TrainingWork, model: PeftModel, batch: Batch) -> Callable[[], dict[str, Any]]:
    """An optimizer step as `train.update` makes it, on the same batch each time."""
    from jobs.bench.our_training import make_runner
    from sam3lora.training.optimization import build_optimizer

    runner, training = make_runner(work, model), work.config.training
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, learning_rate=training.learning_rate, weight_decay=training.weight_decay)

    def step() -> dict[str, Any]:
        counts = StepCounts.from_tensor(distributed.sum_over_workers(StepCounts.of([batch]).tensor()))
        total, terms = runner.backward(batch, counts.normalizer(distributed.world_size()))
        distributed.average_gradients(parameters, torch.stack([total, *terms.values()]).float())
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "gradient_bytes": 4 * sum(parameter.numel() for parameter in parameters),
            "weights": sum(float(parameter.detach().double().abs().sum()) for parameter in parameters),
        }

    return step
