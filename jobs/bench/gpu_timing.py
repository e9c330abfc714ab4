"""Time and memory on a GPU, or on a CPU where there is none."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Row = dict[str, Any]


_END = ContextVar("end of the time", default=math.inf)


class OutOfTime(Exception):
    """The time is over."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """In the block, a `Stopwatch` raises `OutOfTime` at the first part that begins after so many seconds."""
    token = _END.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _END.reset(token)


def time_left_s() -> float:
    """Seconds that the innermost `at_most` leaves.

    Raises:
        OutOfTime: None.
    """
    left = _END.get() - time.monotonic()
    if left <= 0:
        raise OutOfTime
    return left


class Stopwatch:
    """Milliseconds by part: CUDA events, which make nothing wait, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        time_left_s()
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def milliseconds(self) -> dict[str, float]:
        """Of each part since the last call, summed."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, start, end in self._marks:
            taken = start.elapsed_time(end) if self._on_gpu else (end - start) * 1000
            found[name] = found.get(name, 0.0) + taken
        self._marks.clear()
        return found

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def median_ms(run: Callable[[], object], device: torch.device, *, repeats: int, warm_ups: int = 3) -> float:
    """Median milliseconds of a call after some that do not count."""
    watch = Stopwatch(device)
    found = []
    for number in range(warm_ups + repeats):
        with watch.part("all"):
            run()
        taken = watch.milliseconds()["all"]
        if number >= warm_ups:
            found.append(taken)
    return statistics.median(found)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of each part over rounds that all have the same parts."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most memory that tensors took on the GPU since `forget_peak`, in 10^9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
