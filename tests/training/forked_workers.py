"""Several workers of a run, each a process of its own.

A new process imports the module once and forks a process for each worker: importing takes longer than most tests train.
"""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path


def run_workers(module: str, world_size: int, *arguments: object) -> None:
    """Call ``main(rank, world_size, *arguments)`` of a module beside this one, with texts, in each of so many workers.

    Raises:
        AssertionError: A worker has failed; the others were ended.
    """
    command = [sys.executable, "-m", "tests.training.forked_workers", module, str(world_size), *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def main(module: str, world_size: int, *arguments: str) -> None:
    target = importlib.import_module(f"tests.training.{module}").main
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=target, args=(rank, world_size, *arguments), daemon=True) for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    running = list(workers)
    while running and not any(worker.exitcode for worker in workers):
        wait([worker.sentinel for worker in running])
        running = [worker for worker in running if worker.exitcode is None]
    for worker in running:
        worker.terminate()
    sys.exit(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
