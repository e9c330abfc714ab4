"""Time from a command to its first step or its first answer, by the marks that its processes leave."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import serve_app
from jobs.bench.servers import REPOSITORY, our_server
from jobs.bench.serving_report import Rows, ServingReport
from sam3lora.client import Client
from sam3lora.errors import UserError
from sam3lora.local_ray import environment
from sam3lora.start_marks import FILE_VARIABLE, read_marks

FIRST_STEP, FIRST_ANSWER = "first step", "first answer"
_SAMPLES = Path(serve_app.__file__).parent
_LONGEST_S = 240.0


@dataclass(frozen=True)
class Start:
    """One start of a command: seconds from the command to each mark, and what its processes had used by the end.

    `with_torch` counts the processes that have torch loaded, `processor_s` the seconds of all that then ran.
    """

    reached_s: Mapping[str, float]
    processes: int
    with_torch: int
    processor_s: float


def measure_start_up(*, repeats: int = 3) -> ServingReport:
    """`sam3lora --help`, a training with one Ray worker and in this process, and the service, each so many times."""
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch:
        folder = Path(scratch)
        data = _drawn_data(folder / "data")
        helps = [_seconds_of_help() for _ in range(repeats)]
        tables = [
            _table(title, [start(folder / f"{number}-{position}") for position in range(repeats)])
            for number, (title, start) in enumerate(
                {
                    "sam3lora train quick_test": lambda run: train_start(run, data),
                    "sam3lora train quick_test --num-workers 0": lambda run: train_start(run, data, "--num-workers=0"),
                    "sam3lora serve": serve_start,
                }.items()
            )
        ]
    return ServingReport(
        "From a command to its first step or answer",
        tables,
        {"sam3lora --help, seconds": round(statistics.median(helps), 2), "starts of each": repeats},
    )


def train_start(folder: Path, data: Path, *options: str) -> Start:
    """Train one step on a drawn set.

    Raises:
        UserError: The command failed.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "sam3lora", "train", "quick_test", "training.max_steps=1", *options]
    command += ["--data-dir", str(data), "--output-dir", str(folder / "run")]
    with _marked(folder) as marks, (folder / "log").open("wb") as log:
        began = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not any(mark.done == FIRST_STEP for mark in read_marks(marks)):
                if process.poll() or time.time() > began + _LONGEST_S:
                    said = (folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise UserError(f"{' '.join(command[1:])} took no step: {said}")
                time.sleep(0.02)
            found = _start(marks, began)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return found


def serve_start(folder: Path) -> Start:
    """Start the service with its sample adapters, and ask it about its sample image."""
    folder.mkdir()
    with _marked(folder) as marks:
        began = time.time()
        with our_server("tiny", _SAMPLES / "samples", folder / "log") as server:
            ready_s = time.time() - began
            Client(server.url).segment(_SAMPLES / "static" / "sample.jpg", ["gear"], adapter="parts")
            return _start(marks, began, {"ready": ready_s, FIRST_ANSWER: time.time() - began})


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """The file to which processes that are started in the block write their marks."""
    marks = folder / "marks"
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with environment({FILE_VARIABLE: str(marks), "PYTHONPATH": search}):
        yield marks


def _start(marks: Path, began: float, more: Mapping[str, float] | None = None) -> Start:
    ours = [process for process in psutil.process_iter() if _belongs(process, marks)]
    usage = [(_processor_s(process), _has_torch(process)) for process in ours]
    reached = {mark.done: mark.unix_time - began for mark in read_marks(marks)} | dict(more or {})
    return Start(
        dict(sorted(reached.items(), key=lambda item: item[1])),
        processes=len(ours),
        with_torch=sum(has_torch for _, has_torch in usage),
        processor_s=sum(seconds for seconds, _ in usage),
    )


def _belongs(process: psutil.Process, marks: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(FILE_VARIABLE) == str(marks)
    except psutil.Error:
        return False


def _processor_s(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system


def _has_torch(process: psutil.Process) -> bool:
    try:
        return any("libtorch_cpu" in loaded.path for loaded in process.memory_maps())
    except psutil.Error:
        return False


def _table(title: str, starts: Sequence[Start]) -> Rows:
    """Medians over the starts, by mark."""
    rows: list[dict[str, Any]] = []
    before = 0.0
    for done in starts[0].reached_s:
        at = statistics.median(start.reached_s[done] for start in starts)
        rows.append({"done": done, "seconds": round(at - before, 2), "since the command": round(at, 2)})
        before = at
    used = {
        "processes": starts[0].processes,
        "with torch": starts[0].with_torch,
        "processor seconds": round(statistics.median(start.processor_s for start in starts), 1),
    }
    return Rows(title, rows, "; ".join(f"{name} {value}" for name, value in used.items()))


def _seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sam3lora", "--help"], stdout=subprocess.DEVNULL, check=True, cwd=REPOSITORY)
    return time.perf_counter() - began


def _drawn_data(folder: Path) -> Path:
    from sam3lora.data.synth.dataset import write_dataset

    return write_dataset(folder, num_train=8, num_valid=4, seed=0, progress=False)
