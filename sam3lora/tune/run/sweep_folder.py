"""The folder of a sweep: locking it, preparing it, removing leftovers, and when the sweep ran."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam3lora.errors import UserError
from sam3lora.files import remove, remove_leftovers, write_whole
from sam3lora.folder_lock import locked_folder
from sam3lora.tune.run.ledger import REJECTED_FILE, SPACE_FILE, TRIAL_FILE, Ledger, TrialRecord
from sam3lora.tune.run.trial import DECISION_FILE
from sam3lora.tune.space.reader import load_space
from sam3lora.tune.space.search_space import SearchSpace

SUMMARY_FILE = "sweep.json"


@contextlib.contextmanager
def only_driver(sweep_dir: Path, resume: bool) -> Iterator[None]:
    """Lock the folder: two sweeps in it would overwrite each other's trials."""
    if resume and not (sweep_dir / SPACE_FILE).is_file():
        raise UserError(f"nothing to resume: {sweep_dir} holds no sweep; start one without --resume")
    with locked_folder(sweep_dir, "running a sweep"):
        yield


def prepare(space: SearchSpace, sweep_dir: Path, *, resume: bool, retry_failed: bool) -> Ledger:
    """Write the space, unless that would lose or mix up trials.

    A start that failed before its first trial leaves nothing of value and may be repeated.
    """
    space_file, ledger = sweep_dir / SPACE_FILE, Ledger(sweep_dir)
    if resume:
        changed = load_space(space_file).differences(space)
        if changed:
            raise UserError(
                f"cannot resume {sweep_dir} with another search space: {'; '.join(changed)}. Put it back, or start a "
                "new sweep with another --output-dir"
            )
        remove_leftovers(sweep_dir, *(sweep_dir / "trials").glob("*"))
        for record in ledger.records():
            if retry_failed and record.status == "failed":
                _begin_again(ledger, record)
    elif ledger.records():
        raise UserError(
            f"{sweep_dir} already holds a sweep: give --resume to go on with it, or another --output-dir for a new one"
        )
    else:
        (sweep_dir / REJECTED_FILE).unlink(missing_ok=True)
    write_whole(space_file, space.to_yaml())
    return ledger


def _begin_again(ledger: Ledger, failed: TrialRecord) -> None:
    """Keep a trial's settings alone. The new record is written before the files go, so that there always is one."""
    ledger.write(
        TrialRecord(
            number=failed.number,
            values=failed.values,
            is_base=failed.is_base,
            trainable_parameters=failed.trainable_parameters,
        )
    )
    for path in ledger.folder(failed.number).iterdir():
        if path.name != TRIAL_FILE:
            remove(path)


def tidy(ledger: Ledger) -> None:
    """Remove what is no longer needed of trials that have ended."""
    remove_leftovers(ledger.sweep_dir, *(ledger.sweep_dir / "trials").glob("*"))
    for record in ledger.records():
        if record.has_ended:
            for name in ("checkpoints", "last", DECISION_FILE):
                remove(ledger.folder(record.number) / name)


def earlier_sessions(sweep_dir: Path) -> list[dict[str, float]]:
    """When the sweep ran before. A killed driver wrote no end: the time of its trials' last log lines stands for it."""
    file = sweep_dir / SUMMARY_FILE
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError):
        return []
    for session in sessions:
        if "ended_at" not in session:
            logs = [log.stat().st_mtime for log in sweep_dir.glob("trials/*/metrics.jsonl")]
            session["ended_at"] = max([session["started_at"], *logs])
    return sessions


def write_summary(sweep_dir: Path, summary: dict[str, Any]) -> None:
    write_whole(sweep_dir / SUMMARY_FILE, json.dumps(summary, indent=1, allow_nan=False) + "\n")
