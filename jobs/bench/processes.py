"""Ways of doing the same work, each in a process of its own, asked in turns.

A process of its own gives each way its own peak of memory; turns let other work on the machine trouble all alike.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Round = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One way. `make` is a function at the top of a module: called in the new process with `arguments`, it sets up
    and returns what is done in each round; that returns small values that can be pickled, or None.
    """

    make: Callable[..., Round]
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Seconds of the rounds, and the memory of the process in MiB (on a GPU: the device's, as torch counts it).

    `standing_mib` is what it held when it was set up and warm, `peak_mib` the most it held in a round. None where the
    system does not tell. `results` are those of the measured rounds.
    """

    seconds: tuple[float, ...]
    standing_mib: float | None
    peak_mib: float | None
    results: tuple[Any, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def extra_mib(self) -> float | None:
        """The most that a round took beyond what stood before."""
        if self.standing_mib is None or self.peak_mib is None:
            return None
        return self.peak_mib - self.standing_mib


def measure_in_turns(
    ways: Mapping[str, Work], *, rounds: int = 3, warm_ups: int = 1, num_threads: int | None = None
) -> dict[str, Measured]:
    """Set up every way, then run `warm_ups` and `rounds` rounds of all of them, one way at a time.

    Args:
        ways: By name; the order of the turns.
        rounds: Measured.
        warm_ups: Not measured.
        num_threads: Of torch, for each way; None leaves torch's own number.

    Raises:
        ValueError: No rounds.
        RuntimeError: A way failed; the message has its traceback's last line.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be positive, got {rounds}")
    context = multiprocessing.get_context("spawn")
    threads = num_threads or torch.get_num_threads()
    processes, ends = [], {}
    try:
        for name, work in ways.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work, threads), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ends[name] = here
            _ask(name, here, "standing")  # set up one after the other, so that no two disturb each other
        for _ in range(warm_ups):
            for name, end in ends.items():
                _ask(name, end, "round")
        standing = {name: _ask(name, end, "standing") for name, end in ends.items()}
        found: dict[str, list[tuple[float, float | None, Any]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, end in ends.items():
                found[name].append(_ask(name, end, "round"))
        return {name: _measured(standing[name], turns) for name, turns in found.items()}
    finally:
        for end in ends.values():
            end.close()
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _measured(standing: float | None, turns: list[tuple[float, float | None, Any]]) -> Measured:
    seconds, peaks, results = zip(*turns, strict=True)
    known = [peak for peak in peaks if peak is not None]
    return Measured(tuple(seconds), standing, max(known) if known else None, tuple(results))


def _ask(name: str, end: Connection, what: str) -> Any:
    try:
        end.send(what)
        answer = end.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(f"the process of {name!r} ended without an answer") from error
    if isinstance(answer, _Failed):
        raise RuntimeError(f"{name}: {answer.message}")
    return answer


@dataclass(frozen=True)
class _Failed:
    message: str


def _serve(end: Connection, work: Work, num_threads: int) -> None:
    """What the process of one way does: set up, then answer until the other end closes."""
    torch.set_num_threads(num_threads)
    try:
        run = work.make(**work.arguments)
        while True:
            try:
                wanted = end.recv()
            except EOFError:
                return
            end.send(_memory_mib("VmRSS") if wanted == "standing" else _round(run))
    except Exception as error:  # any fault of a way goes to the process that asked
        end.send(_Failed(f"{type(error).__name__}: {error}"))


def _round(run: Round) -> tuple[float, float | None, Any]:
    _forget_peak()
    _wait_for_device()
    start = time.perf_counter()
    result = run()
    _wait_for_device()
    seconds = time.perf_counter() - start
    return seconds, _memory_mib("VmHWM"), result


def _memory_mib(name: str) -> float | None:
    """VmRSS, or its peak VmHWM, of this process; with a GPU in use what torch holds on it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        taken = torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
        return taken / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


def _forget_peak() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    peak = Path("/proc/self/clear_refs")
    if peak.is_file():
        peak.write_text("5", encoding="ascii")


def _wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
