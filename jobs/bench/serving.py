"""Serving over HTTP: `sam3lora serve` beside the plain server, in one run on one machine, with the same weights."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from jobs.bench.load import LoadGenerator
from jobs.bench.servers import our_server, plain_server
from jobs.bench.serving_report import ServingReport
from jobs.bench.serving_tables import (
    Bench,
    answered,
    capacity,
    cold_and_warm,
    grid,
    image_patterns,
    open_loop,
    overhead,
    repeated_image,
)
from jobs.bench.serving_work import RANK, ServingPlan, prepare_work

NUM_PICTURES = {"tiny": 16, "small": 4}
"""Of the pool. Every adapter is asked about each of them once before the servers start."""


def compare_serving(plan: ServingPlan) -> ServingReport:
    """Start both servers, ask both the same in turns, and stop them.

    Raises:
        UserError: A server that does not start, or answers with errors.
    """
    busy_before = _busy_cores()
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch, LoadGenerator() as generator:
        folder = Path(scratch)
        work = prepare_work(folder, plan.model, num_adapters=max(plan.adapters), num_pictures=NUM_PICTURES[plan.model])
        with (
            plain_server(work.model, work.adapters, folder / "plain.log") as plain,
            our_server(work.model, work.adapters, folder / "ours.log", haproxy=plan.haproxy) as ours,
        ):
            bench = Bench(plan, work, generator, plain, ours)
            cold = cold_and_warm(bench)  # before anything else has been asked
            facts = _agreement(bench) | {
                "cores busy before the servers started": busy_before,
                "cores busy while both servers idle": _busy_cores(),
            }
            closed = grid(bench)
            tables = [closed, image_patterns(bench), cold, overhead(bench), open_loop(bench, capacity(closed))]
        if plan.repeated:
            tables.append(repeated_image(folder / "repeated", generator, haproxy=plan.haproxy))
    return ServingReport(
        f"Serving of the {plan.model} model over HTTP: one JPEG of 640 x 480, one prompt, masks as run-length codes",
        tables,
        {
            "plain server": "one process of FastAPI, stock Sam3Model and processor, PEFT set_adapter, a lock",
            "adapters": f"random weights, rank {RANK}; every eighth changes the vision tower, the others the detector",
            **facts,
        },
    )


def _agreement(bench: Bench) -> dict[str, Any]:
    """Every adapter is asked about one picture: both servers, the same question."""
    requests = [of_adapter[0].request() for of_adapter in bench.work.questions.values()]
    plain, ours = (
        [
            _by_score(json.loads(sample.reply)["results"][0]["detections"])
            for sample in answered(bench.generator.in_order(server.url, requests, keep_replies=True)).samples
        ]
        for server in (bench.plain, bench.ours)
    )
    overlaps = [
        float(coco_mask.iou([first[0]["mask"]], [second[0]["mask"]], [0])[0, 0])
        for first, second in zip(plain, ours, strict=True)
        if first and second
    ]
    equal = sum(len(first) == len(second) for first, second in zip(plain, ours, strict=True))
    return {
        "detections, plain": sum(map(len, plain)),
        "detections, ours": sum(map(len, ours)),
        "questions with equally many": f"{equal} of {len(requests)}",
        "IoU of the best mask, median": round(float(np.median(overlaps)), 4) if overlaps else None,
    }


def _by_score(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(detections, key=lambda detection: -detection["score"])


def _busy_cores(seconds: float = 2.0) -> float | None:
    """Cores at work on this machine, by whatever process; None where there is no /proc."""
    counters = Path("/proc/stat")
    if not counters.is_file():
        return None

    def busy_ticks() -> int:
        user, nice, system, _idle, _wait, *rest = map(int, counters.read_text().splitlines()[0].split()[1:9])
        return user + nice + system + sum(rest)

    start, begin = time.monotonic(), busy_ticks()
    time.sleep(seconds)
    return round((busy_ticks() - begin) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start), 2)
