"""Whether a trial goes on: the scheduler decides, and the trial ends itself.

If Ray Tune killed a trial, its Ray Train workers' resources would stay reserved until Ray notices, which it does only
with a dashboard; later trials would wait forever. So the decision on each epoch is a file in the trial's folder. The
trial waits for it after each report, while its workers continue, and stops with everything saved.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sam3lora.errors import RunFailed
from sam3lora.files import write_whole

DECISION_FILE = ".decision"
_SECONDS_BETWEEN_LOOKS, _LONGEST_WAIT_S = 0.05, 30.0


class StoppedEarly(RunFailed):
    """A trial fell behind the others and ends early."""


def write_decision(folder: Path, epoch: int, *, stop: bool) -> None:
    """Write whether the trial ends after an epoch. A decision to stop is final."""
    if not _read(folder).get("stop"):
        write_whole(folder / DECISION_FILE, json.dumps({"epoch": epoch, "stop": stop}))


def await_decision(folder: Path, epoch: int, *, longest_s: float = _LONGEST_WAIT_S) -> None:
    """Wait for the decision on an epoch; without one the trial goes on after `longest_s` seconds.

    Raises:
        StoppedEarly: The trial ends here.
    """
    deadline = time.monotonic() + longest_s
    while True:
        decision = _read(folder)
        if decision.get("stop"):
            raise StoppedEarly(f"stopped after epoch {decision['epoch']}: other trials were better by then")
        if decision.get("epoch", 0) >= epoch or time.monotonic() > deadline:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class EndWhenDecided(UserCallback):
    """A callback of Ray Train's controller, where an exception ends the run and frees the workers' resources."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        await_decision(self._folder, metrics[0]["epoch"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / DECISION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
