"""Threads of the model on a quiet machine and on a busy one: requests per second and latencies by `torch_threads`."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

import serve_app
from jobs.bench.load import LoadGenerator, LoadRequest
from jobs.bench.servers import our_server
from jobs.bench.serving_report import Rows, ServingReport

FOLDER = Path(serve_app.__file__).parent
IMAGE = (FOLDER / "static" / "sample.jpg").read_bytes()
WARM_UP_S = 3.0


def measure_threads(threads: Sequence[int], *, clients: Sequence[int] = (1, 8), seconds: float = 10.0) -> ServingReport:
    """One server after the other; each is asked while nothing else runs, and while every core has other work."""
    cores = os.cpu_count() or 1
    rows = []
    busy_before = psutil.cpu_percent(1.0) * cores / 100
    requests = [
        LoadRequest(f"/v1/segment?prompts=gear&adapter={adapter}", IMAGE) for adapter in ("parts", "parts-light")
    ]
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch, LoadGenerator() as generator:
        for number in threads:
            config = Path(scratch) / "serve.yaml"
            config.write_text(f"torch_threads: {number}\n")
            with our_server("tiny", FOLDER / "samples", Path(scratch) / "log", config=config) as server:
                for others in (0, cores):
                    with _other_work(others):
                        for count in clients:
                            found = generator.closed_loop(
                                server.url, requests, clients=count, seconds=seconds, warm_up_s=WARM_UP_S
                            )
                            taken = [sample.latency_s * 1000 for sample in found.samples if sample.status == 200]
                            p50, p95 = np.percentile(taken, [50, 95]) if taken else (float("nan"), float("nan"))
                            rows.append(
                                {
                                    "torch_threads": number,
                                    "other work": f"{others} processes" if others else "none",
                                    "clients": count,
                                    "requests/s": len(taken) / seconds,
                                    "p50, ms": float(p50),
                                    "p95, ms": float(p95),
                                    "ready after, s": server.start_s,
                                }
                            )
    return ServingReport(
        f"`sam3lora serve` of the tiny model on {cores} cores: the sample image, one prompt, two adapters in turns",
        [Rows("threads", rows)],
        {"cores busy before": busy_before},
    )


@contextmanager
def _other_work(processes: int) -> Iterator[None]:
    """Processes that compute without a pause."""
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def _spin() -> None:
    values = np.random.default_rng(0).random(10_000)
    until = time.monotonic() + 600
    while time.monotonic() < until:
        np.sort(values)
