"""SIGTERM in a process that trains, or that waits for the workers of Ray and passes it on (see `notices`)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sam3lora.errors import RunStopped
from sam3lora.files import remove

STOP_FILE = ".stop"  # in the run folder
STOP_WAIT_S = 300.0  # for which the waiting process leaves the workers time to save


@contextlib.contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at the first SIGTERM while the block runs; a second one does what it would have done before.

    Only the main thread of a process can hear signals: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = handle_first(act)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def passed_on(output_dir: Path) -> Iterator[None]:
    """Pass a SIGTERM of this process on to the workers of Ray, and end after `STOP_WAIT_S` if they do not."""
    stop_file = output_dir / STOP_FILE
    again = threading.Timer(STOP_WAIT_S, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True

    def pass_on() -> None:
        stop_file.touch()
        again.start()

    remove(stop_file)
    try:
        with on_sigterm(pass_on):
            yield
    except SystemExit as stop:  # Ray's own handler, at the second SIGTERM
        if not stop_file.exists():
            raise
        raise RunStopped(
            "stopped by SIGTERM before the workers had saved: steps since the last checkpoint are lost. Train again, "
            "with --resume if there is a checkpoint"
        ) from stop
    finally:
        again.cancel()
        remove(stop_file)


def handle_first(act: Callable[[], None]) -> Any:
    """Call `act` at the first SIGTERM of this process from now on; returns the handler of all later ones."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        act()

    signal.signal(signal.SIGTERM, handle)
    return before
