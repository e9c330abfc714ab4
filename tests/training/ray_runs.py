"""Runs on a local Ray: starting it, finding its workers, and doing something to them at a step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from .run_folder import lines_of

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
# A worker takes two CPUs: its own and that of its data task.
SMALL_STEPS = ("training.batch_size=1", "training.num_workers=1")


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=num_cpus, object_store_memory=int(2e8), **options)
    try:
        yield
    finally:
        ray.shutdown()


def worker_processes() -> list[psutil.Process]:
    """Training workers of the Ray that this process started."""
    return processes_named("RayTrainWorker")


def processes_named(actor: str) -> list[psutil.Process]:
    """Processes of this class of actors, of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith(f"ray::{actor}"[:15]) or actor in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def once_at_step(output_dir: Path, step: int, act) -> Iterator[threading.Event]:
    """Call ``act`` in another thread when the run has logged this step; the event says that it was called."""
    done, stop = threading.Event(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            if any(line["step"] >= step for line in lines_of(output_dir, "step")):
                act()
                done.set()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
