"""Serving of the full-size model over HTTP on a GPU, beside the plain server, which computes in bfloat16 there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_timing import Row, time_left_s

if TYPE_CHECKING:
    from jobs.bench.serving_tables import Bench
    from jobs.bench.serving_work import Images

CLIENTS, NUM_ADAPTERS, NUM_PICTURES = (32, 8, 1), 4, 8
IMAGES: dict[str, Images] = {"repeated": "pool", "new": "different"}


def serving_cases(
    model_name: str, device: torch.device, *, clients: Sequence[int] = CLIENTS, seconds: float = 2.5
) -> Iterator[GpuCase]:
    """Requests a second of both servers: numbers of clients, four adapters in turns, repeated images and new ones.

    Both servers run from the first case to the last; the first one starts them.
    """
    with ExitStack() as running:
        bench = cache(partial(_start, running, model_name, device, clients, seconds))
        for number in clients:
            for words, images in IMAGES.items():

                def measure(number: int = number, images: Images = images) -> Row:
                    from jobs.bench.serving_tables import rates_beside

                    servers = bench()
                    time_left_s()
                    plain, ours = servers.closed_loops(number, NUM_ADAPTERS, images)
                    return rates_beside(plain, ours) | {"errors": plain.num_errors + ours.num_errors}

                yield GpuCase({"clients": number, "images": words}, measure)


def _start(running: ExitStack, model_name: str, device: torch.device, clients: Sequence[int], seconds: float) -> Bench:
    """Both servers start while the thresholds are chosen."""
    from jobs.bench.load import LoadGenerator
    from jobs.bench.servers import our_command, plain_command, started
    from jobs.bench.serving_tables import Bench
    from jobs.bench.serving_work import ServingPlan, ask_thresholds, write_models

    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="sam3lora-bench-")))
    adapters = folder / "adapters"
    name = write_models(folder, model_name, num_adapters=NUM_ADAPTERS, device=device)
    commands = {"plain": plain_command(name, adapters, device=device.type), "ours": our_command(name, adapters)}
    plain, ours = (running.enter_context(started(command, folder / f"{of}.log")) for of, command in commands.items())
    generator = running.enter_context(LoadGenerator())
    work = ask_thresholds(name, adapters, num_pictures=NUM_PICTURES, device=device)
    plan = ServingPlan(clients=tuple(clients), adapters=(NUM_ADAPTERS,), seconds=seconds)
    bench = Bench(plan, work, generator, plain.wait(time_left_s()), ours.wait(time_left_s()))
    generator.in_order(bench.ours.url, work.requests(NUM_ADAPTERS, "pool"))  # the plain server has its adapters already
    return bench
