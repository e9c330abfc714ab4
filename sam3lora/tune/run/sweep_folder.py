"""The folder of a sweep: who may use it, what it holds before and after, and when the sweep ran."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from sam3lora.errors import UserError
from sam3lora.tune.run.decisions import DECISION_FILE
from sam3lora.tune.run.ledger import REJECTED_FILE, SPACE_FILE, TRIAL_FILE, Ledger, TrialRecord
from sam3lora.tune.space.reader import SearchSpace, load_space

SUMMARY_FILE = "sweep.json"


@contextlib.contextmanager
def only_driver(sweep_dir: Path, resume: bool) -> Iterator[None]:
    """Two sweeps in one folder would overwrite each other's trials."""
    if resume and not (sweep_dir / SPACE_FILE).is_file():
        raise UserError(f"nothing to resume: {sweep_dir} holds no sweep; start one without --resume")
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(sweep_dir / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process is running the sweep in {sweep_dir}: wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"cannot write to {sweep_dir}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def prepare(space: SearchSpace, sweep_dir: Path, *, resume: bool, retry_failed: bool) -> Ledger:
    """Refuse what could be lost or mixed up, then write the space.

    A start that failed before its first trial leaves nothing of value: it may be repeated.
    """
    space_file, ledger = sweep_dir / SPACE_FILE, Ledger(sweep_dir)
    if not resume and ledger.records():
        raise UserError(
            f"{sweep_dir} already holds a sweep: give --resume to go on with it, or another --output-dir for a new one"
        )
    if not resume:
        (sweep_dir / REJECTED_FILE).unlink(missing_ok=True)
    if resume:
        changed = load_space(space_file).differences(space)
        if changed:
            raise UserError(
                f"cannot resume {sweep_dir} with another search space: {'; '.join(changed)}. Put it back, or start a "
                "new sweep with another --output-dir"
            )
        _remove_scratch(ledger)
        for record in ledger.records():
            if retry_failed and record.status == "failed":
                _begin_again(ledger, record)
    scratch = space_file.with_suffix(".tmp")
    scratch.write_text(space.to_yaml(), encoding="utf-8")
    os.replace(scratch, space_file)
    return ledger


def _begin_again(ledger: Ledger, failed: TrialRecord) -> None:
    """A trial's settings alone, as if it had not been tried; at no moment is there no record of it."""
    fresh = TrialRecord(
        number=failed.number,
        values=failed.values,
        is_base=failed.is_base,
        trainable_parameters=failed.trainable_parameters,
    )
    ledger.write(fresh)
    for path in ledger.folder(failed.number).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != TRIAL_FILE:
            path.unlink()


def tidy(ledger: Ledger) -> None:
    """Leave no more than is needed of any trial that has ended."""
    _remove_scratch(ledger)
    for record in ledger.records():
        if record.has_ended:
            for name in ("checkpoints", "last"):
                shutil.rmtree(ledger.folder(record.number) / name, ignore_errors=True)
            (ledger.folder(record.number) / DECISION_FILE).unlink(missing_ok=True)


def _remove_scratch(ledger: Ledger) -> None:
    """What killed processes left under hidden names."""
    for folder in (ledger.sweep_dir, *(ledger.sweep_dir / "trials").glob("*")):
        for pattern in (".ray", ".*.tmp", ".*.old", ".*.json"):
            for leftover in folder.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def earlier_sessions(sweep_dir: Path) -> list[dict[str, float]]:
    """When the sweep ran before. A killed driver wrote no end: the last sign of life of a trial stands for it."""
    file = sweep_dir / SUMMARY_FILE
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError):
        return []
    for session in sessions:
        if "ended_at" not in session:
            signs = [log.stat().st_mtime for log in sweep_dir.glob("trials/*/metrics.jsonl")]
            session["ended_at"] = max([session["started_at"], *signs])
    return sessions


def write_summary(sweep_dir: Path, summary: dict[str, Any]) -> None:
    scratch = sweep_dir / ".summary.tmp"
    scratch.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, sweep_dir / SUMMARY_FILE)
