"""What a training worker imports, which begins before there is a worker where its process was started ahead."""

from __future__ import annotations

import contextlib
import importlib
from threading import Thread

from sam3lora.garbage_collection import importing_for_good
from sam3lora.processes_ahead import is_ahead
from sam3lora.start_marks import mark

BEGIN = f"{__name__}.begin_imports"
"""What a worker's process calls at its start."""

_begun: list[Thread] = []


def begin_imports() -> None:
    """Import Ray Train, then the rest on a thread, in a process that is to be a worker."""
    if is_ahead(BEGIN):
        importlib.import_module("sam3lora.training.ray_trainer")
        thread = Thread(target=_import_early, daemon=True)
        thread.start()
        _begun.append(thread)


def finish_imports() -> None:
    """Import all that a worker needs, or wait for the thread that does."""
    for thread in _begun:
        thread.join()
    _import_all()


def _import_early() -> None:
    with contextlib.suppress(Exception):  # `finish_imports` meets it again
        _import_all()
        mark("imports ahead")


def _import_all() -> None:
    with importing_for_good():
        importlib.import_module("ray.train.torch.config")
        importlib.import_module("sam3lora.training.worker")
