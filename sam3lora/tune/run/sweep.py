"""A sweep from its search space to the best adapter and the report."""

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

from sam3lora.cluster import environment, ray_session
from sam3lora.config import Config
from sam3lora.errors import RunFailed
from sam3lora.tune.run.capacity import Concurrency, choose_concurrency, local_concurrency, local_cpus
from sam3lora.tune.run.checks import check_data, checked_data_dir
from sam3lora.tune.run.ledger import Ledger, TrialRecord, best_record
from sam3lora.tune.run.progress import show_progress
from sam3lora.tune.run.sweep_folder import earlier_sessions, only_driver, prepare, tidy, write_summary
from sam3lora.tune.run.trial_summary import summarise
from sam3lora.tune.search.early_stopping import rungs
from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.search.samplers import build_sampler
from sam3lora.tune.space.reader import SearchSpace

REPORT_FILE = "sweep.html"
_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # mAP is not measured every epoch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its state is not used
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "64",  # a trial is ten processes: no reason for a warning
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""What Ray Tune reads from the environment."""


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
    address = address or space.base.scaling.address
    sweep_dir = Path(output_dir).expanduser().absolute()
    space = _with_data_dir(space, checked_data_dir(space))
    num_train_images = check_data(space)
    Proposer(space)  # raises what is wrong with the base or with all samples, before anything is written
    with only_driver(sweep_dir, resume):
        ledger = prepare(space, sweep_dir, resume=resume, retry_failed=retry_failed)
        sessions = [*earlier_sessions(sweep_dir), {"started_at": started}]
        summary: dict[str, Any] = {"sessions": sessions, "max_concurrent": None, "ran_out": False}
        write_summary(sweep_dir, summary)
        try:
            if _has_work(space, ledger):
                summary |= _run_trials(space, ledger, num_train_images, address)
        finally:
            tidy(ledger)
            sessions[-1]["ended_at"] = time.time()
            write_summary(sweep_dir, summary)
        return _finish(space, ledger, summary, address, started)


def _with_data_dir(space: SearchSpace, data_dir: Path) -> SearchSpace:
    """Trials run in other processes, perhaps with other working directories."""
    training = space.base.training.model_copy(update={"data_dir": str(data_dir)})
    return dataclasses.replace(space, base=space.base.model_copy(update={"training": training}))


def _open_numbers(space: SearchSpace, records: list[TrialRecord]) -> tuple[list[int], list[int]]:
    """Numbers of the trials that had begun, and of those to propose."""
    known = {record.number for record in records}
    begun = [record.number for record in records if not record.has_ended]
    return begun, [number for number in range(space.num_trials) if number not in known]


def _has_work(space: SearchSpace, ledger: Ledger) -> bool:
    return any(_open_numbers(space, ledger.records()))


def _say(config: Config, text: str) -> None:
    if config.logging.progress != "off":
        print(text, flush=True)


def _run_trials(space: SearchSpace, ledger: Ledger, num_train_images: int, address: str | None) -> dict[str, Any]:
    """Train all trials that are left; returns what the summary should say about it."""
    config = space.base
    _say(config, "joining Ray" if address or os.environ.get("RAY_ADDRESS") else "starting Ray")
    local = local_concurrency(config, space.search.max_concurrent)
    cpus, dashboard = local_cpus(config, local.trials), config.scaling.num_workers != 0
    with environment(_ENVIRONMENT), ray_session(address, num_cpus=cpus, dashboard=dashboard) as is_local:
        on_cluster = choose_concurrency(config, space.search.max_concurrent)
        room = local if is_local else on_cluster
        begun, new = _open_numbers(space, ledger.records())
        _say(config, f"{len(begun) + len(new)} trials to train, {room.trials} at a time ({room.reason})")
        with show_progress(space, ledger, config.logging.progress):
            ran_out = _tune(space, ledger, room, rungs(space, num_train_images))
    return {"max_concurrent": room.trials, "max_concurrent_reason": room.reason, "ran_out": ran_out}


def _tune(space: SearchSpace, ledger: Ledger, room: Concurrency, milestones: list[int]) -> bool:
    """Hand the trials to Ray Tune; True if the space had fewer configurations than trials were asked for."""
    from ray import tune

    from sam3lora.cluster import choose_gpu
    from sam3lora.tune.run.capacity import DRIVER_RESOURCES, trial_needs
    from sam3lora.tune.run.trial import run_trial
    from sam3lora.tune.search.ray_scheduler import build_scheduler
    from sam3lora.tune.search.ray_searcher import LedgerSearcher

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
        may_stop=bool(milestones),
        settle=functools.partial(_settle, space, ledger),
    )
    in_process = space.base.scaling.num_workers == 0
    needs = trial_needs(space.base, use_gpu=choose_gpu(space.base))[0] if in_process else DRIVER_RESOURCES
    scratch = ledger.sweep_dir / ".ray"
    tuner = tune.Tuner(
        tune.with_resources(run_trial, needs),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=build_scheduler(space, milestones, records),
            num_samples=len(begun) + len(new),
            max_concurrent_trials=room.trials,
            reuse_actors=False,  # what a trial leaves in memory goes with its process
        ),
        # A name used twice would bring Ray's own bookkeeping back.
        run_config=tune.RunConfig(name=f"sweep_{uuid.uuid4().hex[:8]}", storage_path=str(scratch), verbose=0),
    )
    try:
        with _terminable():
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return searcher.ran_out


def _settle(space: SearchSpace, ledger: Ledger, number: int) -> TrialRecord:
    """The record of a trial whose process has ended: the trial's own, unless it was killed."""
    record = ledger.read(number)
    if record.has_ended:
        return record
    summarise(record, ledger.folder(number), metric=space.search.metric, mode=space.search.mode)
    record.ended_at = time.time()
    record.status, record.failure = "failed", "process lost"
    record.reason = "the process of the trial ended without a word: killed, or its host is gone"
    ledger.write(record)
    return record


def _finish(
    space: SearchSpace, ledger: Ledger, summary: dict[str, Any], address: str | None, started: float
) -> SweepResult:
    """Tables, the best adapter, the held-out measurement, and the report."""
    from sam3lora.tune.run.outcome import write_outcome

    records = ledger.records()
    best = best_record(records, space.search.mode)
    base = next((record for record in records if record.is_base and record.value is not None), None)
    _say(space.base, "writing the results")
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
    """A polite end (SIGTERM, as a stopped job gets) closes the books as an interrupt does."""
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
