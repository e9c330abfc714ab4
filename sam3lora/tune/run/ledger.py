"""The records of a sweep's trials on disk, from which a killed sweep goes on.

Ray Tune's own state is not kept. A trial's folder is named by its number, so a resumed sweep reads there which trials
have ended, which had begun and what their settings were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sam3lora.errors import UserError
from sam3lora.files import write_whole

SPACE_FILE, TRIAL_FILE, REJECTED_FILE = "space.yaml", "trial.json", "rejected.jsonl"

Status = Literal["pending", "running", "finished", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")

FailureKind = Literal[
    "out of memory", "loss not finite", "worker lost", "process lost", "impossible settings", "bad data", "exception"
]


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        number: From 0; the folder's name.
        values: Parameter -> value, as in the search space; tied values and labels of component sets included.
        is_base: Whether it is the base configuration as it was.
        status: "finished" trained to its end, "stopped" ended early, "failed" has a `reason`.
        value: The metric of the adapter in `best/`; None if nothing was measured.
        metrics: Its other metrics: valid_loss, map, cgf1, off_prompt_fpr, ...
        best_epoch: Its epoch, from 1.
        history: One entry a validation: epoch (from 1), time (seconds since 1970), train_loss, valid_loss, and metrics.
        retries: Changed settings of each new attempt after running out of memory: reason, batch_size,
            gradient_accumulation_steps.
        started_at, ended_at: Seconds since 1970; the start of the first attempt.
        seconds: Spent training, without pauses between sessions and without an attempt that ran out of memory.
        images_per_second: In training, over the last epoch.
        memory_mb: Peak memory of the first worker.
        vision_passes: Images that went through the vision trunk.
        features_loaded: Images whose trunk output came from the cache.
    """

    number: int
    values: dict[str, Any]
    is_base: bool = False
    trainable_parameters: int = 0
    status: Status = "pending"
    value: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    best_epoch: int | None = None
    epochs: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    failure: FailureKind | None = None
    reason: str | None = None
    retries: list[dict[str, Any]] = field(default_factory=list)
    started_at: float | None = None
    ended_at: float | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    memory_mb: float | None = None
    vision_passes: int = 0
    features_loaded: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Rejection:
    """A sample that was never trained."""

    number: int  # of the trial it was proposed for
    values: dict[str, Any]
    kind: Literal["over budget", "impossible settings", "already tried"]
    reason: str
    trainable_parameters: int | None = None  # None if they could not be counted


class Ledger:
    """The records of a sweep folder. Every change is on disk, whole, when the call returns."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self._trials = sweep_dir / "trials"

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self._trials / f"{number:04d}"

    def read(self, number: int) -> TrialRecord:
        return read_trial_record(self.folder(number))

    def records(self) -> list[TrialRecord]:
        """All trials that have a record, by number."""
        return [read_trial_record(file.parent) for file in sorted(self._trials.glob(f"*/{TRIAL_FILE}"))]

    def write(self, record: TrialRecord) -> None:
        """Replace a trial's record; its folder is made if need be."""
        folder = self.folder(record.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TRIAL_FILE, json.dumps(asdict(record), indent=1, allow_nan=False))

    def reject(self, rejection: Rejection) -> None:
        with (self.sweep_dir / REJECTED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(rejection)) + "\n")

    def rejections(self) -> list[Rejection]:
        file = self.sweep_dir / REJECTED_FILE
        if not file.is_file():
            return []
        found = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Rejection(**json.loads(line)))
            except (ValueError, TypeError):  # a killed process may leave half a line
                continue
        return found


def read_trial_record(folder: Path) -> TrialRecord:
    """The record in a trial's folder.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return TrialRecord(**json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / TRIAL_FILE} cannot be read ({error}): remove the folder to have the trial done again"
        ) from error


def better(value: float | None, than: float | None, mode: str) -> bool:
    """Whether a metric's value is better than another; every value is better than None."""
    if value is None:
        return False
    return than is None or (value < than if mode == "min" else value > than)


def has_value(record: TrialRecord) -> bool:
    """Whether a trial counts in comparisons: it has not failed and something was measured."""
    return record.value is not None and record.status != "failed"


def best_record(records: list[TrialRecord], mode: str) -> TrialRecord | None:
    """The trial with the best value, failed trials left out. Ties go to the smaller adapter, then the earlier trial."""
    found: TrialRecord | None = None
    for record in sorted(records, key=lambda entry: (entry.trainable_parameters, entry.number)):
        if has_value(record) and better(record.value, found.value if found else None, mode):
            found = record
    return found


def seconds_in_sessions(timestamp: float, sessions: list[Mapping[str, float]]) -> float:
    """Seconds that the sweep had run at a point in time, without the pauses between sessions."""
    total = 0.0
    for session in sessions:
        end = session.get("ended_at") or time.time()
        total += max(0.0, min(timestamp, end) - session["started_at"])
    return total
