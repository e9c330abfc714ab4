"""The report of a benchmark: times of several ways of doing the same work, and the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jobs.bench.tables import text_table


@dataclass(frozen=True)
class Timing:
    """Time and memory of one way of doing the work; `extra_mib` is its peak beyond what was in use before."""

    name: str
    seconds: float
    extra_mib: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """Ways of doing one piece of work, ours first. `facts` says what was done and that the results agree."""

    title: str
    ways: Sequence[Timing]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def ratio(self, way: Timing) -> float:
        """Our time divided by that of `way`: below 1 we are faster."""
        return self.ways[0].seconds / way.seconds

    def to_dict(self) -> dict[str, Any]:
        ways = [asdict(way) | {"ratio": self.ratio(way)} for way in self.ways]
        return {"title": self.title, "machine": machine(), "facts": dict(self.facts), "ways": ways}

    def print(self, console: Console) -> None:
        memory = any(way.extra_mib is not None for way in self.ways)
        console.print(f"\n{self.title}\n", highlight=False)
        rows = []
        for way in self.ways:
            row = {"way": way.name, "seconds": f"{way.seconds:.3f}"}
            if memory:
                row["extra memory, MiB"] = "-" if way.extra_mib is None else f"{way.extra_mib:.0f}"
            rows.append(row | {"ours / this": "" if way is self.ways[0] else f"{self.ratio(way):.3f}"})
        print_table(rows, console)
        for name, value in self.facts.items():
            if isinstance(value, Mapping):
                value = "; ".join(f"{part} {figure}" for part, figure in value.items())
            console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
        console.print(machine_line(), highlight=False, soft_wrap=True)


def print_table(rows: Sequence[Mapping[str, Any]], console: Console, *, keys: int = 1) -> None:
    """A table of plain text as wide as the console: nothing of it is cut off."""
    lines = text_table(rows, width=console.width, keys=keys)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def time_in_turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Seconds of each way, the median of `repeats` rounds after one to warm up.

    Every round runs all ways one after the other, so that other work on the machine troubles them alike.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be positive, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, run in ways.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, threads, GPU and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_line() -> str:
    found = machine()
    gpu = f"; {found['gpu']}" if found["gpu"] else ""
    return f"{found['processor']}, {found['threads']} threads{gpu}; torch {found['torch']}, Python {found['python']}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
