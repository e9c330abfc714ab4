"""The collective calls of a training step, timed among many processes on one machine."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sam3lora.training import distributed

NUM_COUNTS, NUM_TERMS = 3, 18
"""Numbers that travel before the backward pass, and with the gradients."""

NUM_PARAMETERS = 200


def time_collectives(count: int, gradient_bytes: int, *, repeats: int = 10) -> dict[str, float]:
    """Median seconds of each collective call of a training step, over gloo.

    All processes have one thread and share the processors of this machine, so for more of them than it has processors
    the figures are too high.

    Args:
        count: Number of processes.
        gradient_bytes: Of the gradients, float32.
        repeats: Of each call, after one that does not count.

    Returns:
        `counts`, the sum of what the loss is divided by, and `gradients`, their mean in one buffer.
    """
    context = multiprocessing.get_context("forkserver")  # its processes begin with this module loaded
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        method = f"file://{Path(folder) / 'rendezvous'}"
        processes = [
            context.Process(
                target=_take_part,
                args=(there if rank == 0 else None, method, rank, count, gradient_bytes, repeats),
                daemon=True,
            )
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            there.close()
            found: dict[str, float] = here.recv()
            return found
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.terminate()


def _take_part(end: Connection | None, method: str, rank: int, count: int, gradient_bytes: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    parameters = [Parameter(torch.zeros(size)) for size in _split(max(1, gradient_bytes // 4), NUM_PARAMETERS)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    calls: dict[str, Callable[[], Tensor]] = {
        "counts": lambda: distributed.sum_over_workers(torch.ones(NUM_COUNTS, dtype=torch.float64)),
        "gradients": partial(distributed.average_gradients, parameters, torch.zeros(NUM_TERMS)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    if end is not None:
        end.send({name: statistics.median(values) for name, values in seconds.items()})
    dist.barrier()
    dist.destroy_process_group()


def _split(total: int, parts: int) -> list[int]:
    size = -(-total // parts)
    return [min(size, total - start) for start in range(0, total, size)]
