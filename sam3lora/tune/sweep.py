"""A sweep from its search space to the best adapter and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from sam3lora.cluster import ray_session
from sam3lora.errors import RunFailed, UserError
from sam3lora.tune.capacity import Concurrency, choose_concurrency, local_concurrency, local_cpus
from sam3lora.tune.progress import show_progress
from sam3lora.tune.proposals import Proposer
from sam3lora.tune.samplers import build_sampler
from sam3lora.tune.space import SearchSpace, load_space
from sam3lora.tune.summary import summarise
from sam3lora.tune.trial_run import SPACE_FILE
from sam3lora.tune.trials import Ledger, TrialRecord, best_record

logger = logging.getLogger(__name__)

SUMMARY_FILE, REPORT_FILE = "sweep.json", "sweep.html"


@dataclass
class SweepResult:
    """What a sweep left. ``best`` and ``base`` are trials with a value, or None."""

    sweep_dir: Path
    records: list[TrialRecord]
    best: TrialRecord | None
    base: TrialRecord | None
    report: Path
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)


def run_sweep(
    space: SearchSpace,
    output_dir: str | Path,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Try what a search space proposes and keep the best adapter.

    Args:
        space: from ``load_space``.
        output_dir: folder of the sweep.
        resume: go on with the sweep in the folder. Trials that have ended are left as they are, begun ones go on from
            their checkpoints; ``num_trials`` may be larger than before.
        retry_failed: when resuming, do failed trials again as well.
        address: Ray cluster to run on; a local Ray otherwise.

    Raises:
        UserError: a mistake in the space, the data, the folder or the cluster.
        RunFailed: no trial produced an adapter. The report says why.
    """
    started = time.time()
    sweep_dir = Path(output_dir).expanduser().absolute()
    space = _with_data_dir(space, checked_data_dir(space))
    with _only_driver(sweep_dir, resume):
        ledger = _prepare(space, sweep_dir, resume=resume, retry_failed=retry_failed)
        sessions = [*_earlier_sessions(sweep_dir), {"started_at": started}]
        summary: dict[str, Any] = {"sessions": sessions, "max_concurrent": None, "ran_out": False}
        _write_summary(sweep_dir, summary)
        try:
            if _has_work(space, ledger):
                summary |= _run_trials(space, ledger, address or space.base.scaling.address)
        finally:
            _settle_all(space, ledger)
            sessions[-1]["ended_at"] = time.time()
            _write_summary(sweep_dir, summary)
        return _finish(space, ledger, summary, time.time() - started)


def _with_data_dir(space: SearchSpace, data_dir: Path) -> SearchSpace:
    """Trials run in other processes, perhaps with other working directories."""
    training = space.base.training.model_copy(update={"data_dir": str(data_dir)})
    return dataclasses.replace(space, base=space.base.model_copy(update={"training": training}))


def checked_data_dir(space: SearchSpace) -> Path:
    data_dir = space.base.training.required_data_dir().absolute()
    for split in (space.base.data.train_split, space.base.data.valid_split):
        if not (data_dir / split).is_dir():
            raise UserError(
                f"a sweep compares trials on validation images, but there is no folder {data_dir / split}: make one "
                "with sam3lora data split, or name it with data.train_split and data.valid_split"
            )
    return data_dir


@contextlib.contextmanager
def _only_driver(sweep_dir: Path, resume: bool) -> Iterator[None]:
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


def _prepare(space: SearchSpace, sweep_dir: Path, *, resume: bool, retry_failed: bool) -> Ledger:
    """Refuse what could be lost or mixed up, then write the space."""
    space_file, ledger = sweep_dir / SPACE_FILE, Ledger(sweep_dir)
    if not resume and (space_file.exists() or ledger.records()):
        raise UserError(
            f"{sweep_dir} already holds a sweep: give --resume to go on with it, or another --output-dir for a new one"
        )
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
                shutil.rmtree(ledger.folder(record.number))
                ledger.write(
                    TrialRecord(
                        number=record.number,
                        values=record.values,
                        is_base=record.is_base,
                        trainable_parameters=record.trainable_parameters,
                    )
                )
    scratch = space_file.with_suffix(".tmp")
    scratch.write_text(space.to_yaml(), encoding="utf-8")
    os.replace(scratch, space_file)
    return ledger


def _open_numbers(space: SearchSpace, records: list[TrialRecord]) -> tuple[list[int], list[int]]:
    """Numbers of the trials that had begun, and of those to propose."""
    known = {record.number for record in records}
    begun = [record.number for record in records if not record.has_ended]
    return begun, [number for number in range(space.num_trials) if number not in known]


def _has_work(space: SearchSpace, ledger: Ledger) -> bool:
    return any(_open_numbers(space, ledger.records()))


def _run_trials(space: SearchSpace, ledger: Ledger, address: str | None) -> dict[str, Any]:
    """Train all trials that are left; returns what the summary should say about it."""
    config = space.base
    local = local_concurrency(config, space.search.max_concurrent)
    with _environment(), ray_session(address, num_cpus=local_cpus(config, local.trials)) as is_local:
        room = local if is_local else choose_concurrency(config, space.search.max_concurrent)
        logger.info("%d trials at a time: %s", room.trials, room.reason)
        with show_progress(space, ledger, config.logging.progress):
            ran_out = _tune(space, ledger, room)
    return {"max_concurrent": room.trials, "max_concurrent_reason": room.reason, "ran_out": ran_out}


def _tune(space: SearchSpace, ledger: Ledger, room: Concurrency) -> bool:
    """Hand the trials to Ray Tune; True if the space had fewer configurations than trials were asked for."""
    from ray import tune

    from sam3lora.train.cluster import choose_gpu
    from sam3lora.tune.capacity import DRIVER_RESOURCES, trial_needs
    from sam3lora.tune.scheduler import build_scheduler
    from sam3lora.tune.searcher import LedgerSearcher
    from sam3lora.tune.trial_run import run_trial

    records = ledger.records()
    begun, new = _open_numbers(space, records)
    sampler = build_sampler(space)
    ended = [record for record in records if record.has_ended]
    for record in ended:
        sampler.observe(record)
    searcher = LedgerSearcher(
        ledger,
        Proposer(space, taken=records, on_reject=ledger.reject, sampler=sampler, rejected=ledger.rejections()),
        sampler,
        begun=begun,
        new=new,
        settle=functools.partial(_settle, space, ledger),
    )
    in_process = space.base.scaling.num_workers == 0
    needs = trial_needs(space.base, use_gpu=choose_gpu(space.base))[0] if in_process else DRIVER_RESOURCES
    scratch = ledger.sweep_dir / ".ray"
    tuner = tune.Tuner(
        tune.with_resources(run_trial, needs),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=build_scheduler(space, ended),
            num_samples=len(begun) + len(new),
            max_concurrent_trials=room.trials,
            reuse_actors=False,  # what a trial leaves in memory goes with its process
        ),
        # A name used twice would bring Ray's own bookkeeping back.
        run_config=tune.RunConfig(name=f"sweep_{uuid.uuid4().hex[:8]}", storage_path=str(scratch), verbose=0),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return searcher.ran_out


def _settle(space: SearchSpace, ledger: Ledger, number: int, lost: bool) -> TrialRecord:
    """The record of a trial that Ray Tune is through with: the trial's own, unless it was cut short."""
    record = ledger.read(number)
    if record.has_ended:
        return record
    summarise(record, ledger.folder(number), metric=space.search.metric, mode=space.search.mode)
    record.ended_at = time.time()
    record.status = "stopped"
    if lost:
        record.status, record.failure = "failed", "process lost"
        record.reason = "the process of the trial ended without a word: killed, or its host is gone"
    ledger.write(record)
    return record


def _settle_all(space: SearchSpace, ledger: Ledger) -> None:
    """Stopped trials as their folders are, and no more than is needed of any ended one."""
    _remove_scratch(ledger)
    for record in ledger.records():
        folder = ledger.folder(record.number)
        if record.status == "stopped":  # it may have gone on for a moment after the decision
            summarise(record, folder, metric=space.search.metric, mode=space.search.mode)
            ledger.write(record)
        if record.has_ended:
            for name in ("checkpoints", "last"):
                shutil.rmtree(folder / name, ignore_errors=True)


def _remove_scratch(ledger: Ledger) -> None:
    """What killed processes left under hidden names."""
    for folder in (ledger.sweep_dir, *(ledger.sweep_dir / "trials").glob("*")):
        for pattern in (".ray", ".*.tmp", ".*.old", ".*.json"):
            for leftover in folder.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def _finish(space: SearchSpace, ledger: Ledger, summary: dict[str, Any], seconds: float) -> SweepResult:
    """Tables, the best adapter, the held-out measurement, and the report."""
    from sam3lora.tune.outcome import write_outcome

    records = ledger.records()
    best = best_record(records, space.search.mode)
    base = next((record for record in records if record.is_base and record.value is not None), None)
    summary |= write_outcome(space, ledger, best=best, base=base, summary=summary)
    _write_summary(ledger.sweep_dir, summary)
    report = ledger.sweep_dir / REPORT_FILE
    if best is None:
        reasons = sorted({f"{record.failure}: {record.reason}" for record in records if record.status == "failed"})
        raise RunFailed(
            f"no trial of the sweep in {ledger.sweep_dir} produced an adapter: {'; '.join(reasons) or 'none ran'}. "
            f"The report is {report}"
        )
    return SweepResult(ledger.sweep_dir, records, best, base, report, seconds, summary)


def _earlier_sessions(sweep_dir: Path) -> list[dict[str, float]]:
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


def _write_summary(sweep_dir: Path, summary: dict[str, Any]) -> None:
    scratch = sweep_dir / ".summary.tmp"
    scratch.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, sweep_dir / SUMMARY_FILE)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Ray Tune reads from the environment, for this sweep only."""
    names = {
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # mAP is not measured every epoch
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its state is not used
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_worker_maximum_startup_concurrency": "64",  # a trial is ten processes: no reason for a warning
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
