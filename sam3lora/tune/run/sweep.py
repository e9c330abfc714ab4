"""Running a sweep, from its search space to the best adapter and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.cluster import ray_session
from sam3lora.config import Config
from sam3lora.data.fault_report import fault_summary
from sam3lora.errors import RunFailed
from sam3lora.extras import check_extras
from sam3lora.files import scratch_folder
from sam3lora.local_paths import refuse_bad_path
from sam3lora.local_ray import environment
from sam3lora.tune.run.capacity import Concurrency, choose_concurrency, local_concurrency, local_cpus
from sam3lora.tune.run.checks import check_data, checked_data_dir
from sam3lora.tune.run.ledger import Ledger, TrialRecord, best_record
from sam3lora.tune.run.progress import show_progress
from sam3lora.tune.run.sweep_folder import earlier_sessions, only_driver, prepare, tidy, write_summary
from sam3lora.tune.run.trial_summary import current_record
from sam3lora.tune.search.early_stopping import rungs
from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.space.search_space import SearchSpace

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger and the run folders hold everything
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the sweep at once
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "64",  # a trial has ten processes, of which Ray would warn
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay valid
}
"""Settings of Ray Tune that it reads only from the environment."""


@dataclass
class SweepResult:
    """The result of a sweep. `best` and `base` are trials with a value, or None."""

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
    """Train the trials of a search space and keep the best adapter.

    Args:
        resume: Go on with the sweep in the folder. Trials that have ended stay as they are, begun ones go on from their
            checkpoints; `num_trials` may be larger than before.
        retry_failed: When resuming, do failed trials again as well.
        address: Ray cluster to run on; a local Ray otherwise.

    Raises:
        UserError: A mistake in the space, the data, the folder or the cluster.
        RunFailed: No trial produced an adapter. The report says why.
    """
    started = time.time()
    refuse_bad_path(output_dir, "--output-dir")
    address = address or space.base.scaling.address
    sweep_dir = Path(output_dir).expanduser().absolute()
    checked_data_dir(space)
    check_extras(space.base)
    # Trials run in other processes, perhaps with other working directories.
    space = dataclasses.replace(space, base=space.base.with_absolute_paths())
    data = check_data(space)
    num_train_images, faults = len(data.train), data.faults
    del data  # the trials index it themselves
    Proposer(space)  # raises what is wrong with the base or with all samples, before anything is written
    with only_driver(sweep_dir, resume):
        ledger = prepare(space, sweep_dir, resume=resume, retry_failed=retry_failed)
        sessions = [*earlier_sessions(sweep_dir), {"started_at": started}]
        summary: dict[str, Any] = {"sessions": sessions, "max_concurrent": None, "ran_out": False, "faults": faults}
        write_summary(sweep_dir, summary)
        if faults:
            _print_step(space.base, fault_summary(faults, checked_data_dir(space)))
        try:
            if any(_open_numbers(space, ledger.records())):
                summary |= _run_trials(space, ledger, num_train_images, address)
        finally:
            tidy(ledger)
            sessions[-1]["ended_at"] = time.time()
            write_summary(sweep_dir, summary)
        return _finish(space, ledger, summary, address, started)


def _open_numbers(space: SearchSpace, records: list[TrialRecord]) -> tuple[list[int], list[int]]:
    """Numbers of the trials that had begun, and of those to propose."""
    known = {record.number for record in records}
    begun = [record.number for record in records if not record.has_ended]
    return begun, [number for number in range(space.num_trials) if number not in known]


def _print_step(config: Config, text: str) -> None:
    if config.logging.progress != "off":
        print(text, flush=True)


def _run_trials(space: SearchSpace, ledger: Ledger, num_train_images: int, address: str | None) -> dict[str, Any]:
    """Train all trials that are left; returns entries of the summary."""
    config = space.base
    _print_step(config, "joining Ray" if address or os.environ.get("RAY_ADDRESS") else "starting Ray")
    local = local_concurrency(config, space.search.max_concurrent)
    cpus, dashboard = local_cpus(config, local.trials), config.scaling.num_workers != 0
    with environment(_ENVIRONMENT), ray_session(address, num_cpus=cpus, dashboard=dashboard) as is_local:
        on_cluster = choose_concurrency(config, space.search.max_concurrent)
        room = local if is_local else on_cluster
        begun, new = _open_numbers(space, ledger.records())
        _print_step(config, f"{len(begun) + len(new)} trials to train, {room.trials} at a time ({room.reason})")
        with show_progress(space, ledger, config.logging.progress):
            ran_out = _tune(space, ledger, room, rungs(space, num_train_images))
    return {"max_concurrent": room.trials, "max_concurrent_reason": room.reason, "ran_out": ran_out}


def _tune(space: SearchSpace, ledger: Ledger, room: Concurrency, milestones: list[int]) -> bool:
    """Let Ray Tune run the trials; True if the space has fewer configurations than trials were asked for."""
    from ray import tune

    from sam3lora.cluster import choose_gpu
    from sam3lora.tune.run.capacity import DRIVER_RESOURCES, trial_needs
    from sam3lora.tune.run.trial import run_trial
    from sam3lora.tune.search.ray_tune import LedgerSearcher, build_scheduler

    records = [current_record(ledger.folder(record.number), space.search) for record in ledger.records()]
    begun, new = _open_numbers(space, records)
    searcher = LedgerSearcher(
        ledger,
        Proposer(space, taken=records, rejected=ledger.rejections(), on_reject=ledger.reject),
        begun=begun,
        new=new,
        may_stop=bool(milestones),
        settle=functools.partial(_settle, space, ledger),
    )
    in_process = space.base.scaling.num_workers == 0
    needs = trial_needs(space.base, use_gpu=choose_gpu(space.base))[0] if in_process else DRIVER_RESOURCES
    scratch = scratch_folder(ledger.sweep_dir)
    trial = tune.with_parameters(run_trial, space=space, sweep_dir=ledger.sweep_dir)
    tuner = tune.Tuner(
        tune.with_resources(trial, needs),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=build_scheduler(space, milestones, records),
            num_samples=len(begun) + len(new),
            max_concurrent_trials=room.trials,
            reuse_actors=False,  # a new process for each trial frees its memory
        ),
        # With a name that it knows Ray would resume its own state.
        run_config=tune.RunConfig(name=f"sweep_{uuid.uuid4().hex[:8]}", storage_path=str(scratch), verbose=0),
    )
    try:
        with _terminable():
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return searcher.ran_out


def _settle(space: SearchSpace, ledger: Ledger, number: int) -> TrialRecord:
    """The final record of a trial whose process has ended. A killed process wrote none."""
    record = current_record(ledger.folder(number), space.search)
    if not record.has_ended:
        record.ended_at = time.time()
        record.status, record.failure = "failed", "process lost"
        record.reason = "the process of the trial ended without a record: it was killed, or its host is gone"
        ledger.write(record)
    return record


def _finish(
    space: SearchSpace, ledger: Ledger, summary: dict[str, Any], address: str | None, started: float
) -> SweepResult:
    """Tables, the best adapter, the held-out measurement, and the report."""
    from sam3lora.tune.run.outcome import REPORT_FILE, write_outcome

    records = ledger.records()
    best = best_record(records, space.search.mode)
    base = next((record for record in records if record.is_base and record.value is not None), None)
    _print_step(space.base, "writing the results")
    summary |= write_outcome(space, ledger, best=best, base=base, summary=summary, address=address)
    write_summary(ledger.sweep_dir, summary)
    report = ledger.sweep_dir / REPORT_FILE
    if best is None:
        reasons = sorted({f"{record.failure}: {record.reason}" for record in records if record.status == "failed"})
        raise RunFailed(
            f"no trial of the sweep in {ledger.sweep_dir} produced an adapter: {'; '.join(reasons) or 'none ran'}. "
            f"The report is {report}"
        )
    return SweepResult(ledger.sweep_dir, records, best, base, report, time.time() - started, summary)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM, which stops a job, like an interrupt, so that the sweep closes its records."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
