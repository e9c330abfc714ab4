"""Whether a trial goes on: Ray Tune's scheduler decides, and the trial ends itself.

Killing a trial from outside would leave its Ray Train workers' resources reserved until Ray finds out, which it does
not without a dashboard; later trials would wait for them without end. So the decision on each epoch is a file in the
trial's folder. The trial waits for it after it has reported, while its workers go on, and stops with everything saved.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sam3lora.errors import RunFailed

DECISION_FILE = ".decision"
_SECONDS_BETWEEN_LOOKS, _LONGEST_WAIT_S = 0.05, 30.0


class StoppedEarly(RunFailed):
    """A trial fell behind others and was given up."""


def write_decision(folder: Path, epoch: int, *, stop: bool) -> None:
    """Say that an epoch was looked at, and whether the trial ends after it. A decision to stop stays."""
    if _read(folder).get("stop"):
        return
    scratch = folder / f"{DECISION_FILE}.tmp"
    scratch.write_text(json.dumps({"epoch": epoch, "stop": stop}), encoding="utf-8")
    os.replace(scratch, folder / DECISION_FILE)


def await_decision(folder: Path, epoch: int, *, longest_s: float = _LONGEST_WAIT_S) -> None:
    """Wait until an epoch has been looked at; go on without a decision that does not come.

    Raises:
        StoppedEarly: the trial ends here.
    """
    deadline = time.monotonic() + longest_s
    while True:
        decision = _read(folder)
        if decision.get("stop"):
            raise StoppedEarly(f"given up after epoch {decision['epoch']}: other trials were better by then")
        if decision.get("epoch", 0) >= epoch or time.monotonic() > deadline:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class EndWhenDecided(UserCallback):
    """In Ray Train's controller, where an exception ends the run and frees what its workers held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        await_decision(self._folder, metrics[0]["epoch"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / DECISION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
