"""Marks of how far a start has come, which `python jobs/bench.py start-up` reads; written only if a variable asks.

Each process of a run or of the service appends its own lines, so the file shows them side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_VARIABLE = "SAM3LORA_START_MARKS"
"""Environment variable: the file to append to. A local Ray hands it on to its processes."""


@dataclass(frozen=True)
class StartMark:
    """What a process has done, and when (Unix time)."""

    done: str
    unix_time: float
    pid: int


def mark(done: str) -> None:
    """Say that this process has done a part of its start."""
    if file := os.environ.get(FILE_VARIABLE):
        line = json.dumps(asdict(StartMark(done, time.time(), os.getpid())))
        # A short line is appended whole. What is started goes on where it cannot be written.
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as marks:
            marks.write(f"{line}\n")


def read_marks(file: Path) -> Iterator[StartMark]:
    """The marks so far, in the order of their writing."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may be half-written
                yield StartMark(**json.loads(line))
