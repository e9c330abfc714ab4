"""One trial of a sweep: train, try again with smaller batches if memory ran out, and write the record.

No error of a trial is raised: its record says why it failed, and the sweep goes on.

The scheduler decides whether a trial goes on, and the trial ends itself. If Ray Tune killed it, its Ray Train workers'
resources would stay reserved until Ray notices, which it does only with a dashboard; later trials would wait forever.
So the decision on each epoch is a file in the trial's folder. The trial waits for it after each report, while its
workers continue, and stops with everything saved.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sam3lora.config import Config
from sam3lora.config.training import images_per_step
from sam3lora.data.images import ImageError
from sam3lora.errors import OutOfMemory, RunFailed, UserError, WorkerLost
from sam3lora.files import write_whole
from sam3lora.training.checkpoint_folders import list_checkpoints
from sam3lora.training.launch import train
from sam3lora.training.update import NonFiniteLoss
from sam3lora.tune.run.ledger import FailureKind, Ledger, TrialRecord
from sam3lora.tune.run.trial_summary import summarise
from sam3lora.tune.space.search_space import SearchSpace

RETRY_KEYS = ("batch_size", "gradient_accumulation_steps")
_REASON_LENGTH = 2000
DECISION_FILE = ".decision"
_SECONDS_BETWEEN_LOOKS, _LONGEST_WAIT_S = 0.05, 30.0

Report = Callable[[dict[str, Any]], None]


def run_trial(params: dict[str, Any], space: SearchSpace, sweep_dir: Path) -> None:
    """The function that Ray Tune calls.

    Args:
        params: From `LedgerSearcher`: `number` of a trial with a record; `may_stop`, whether there is early stopping.
    """
    from ray import tune

    ledger = Ledger(sweep_dir)
    folder, may_stop = ledger.folder(params["number"]), params["may_stop"]

    def report(entry: dict[str, Any]) -> None:
        tune.report(entry)
        if may_stop:
            await_decision(folder, entry["epoch"])

    complete_trial(space, ledger, params["number"], report, may_stop=may_stop)


def complete_trial(
    space: SearchSpace, ledger: Ledger, number: int, report: Report, *, may_stop: bool = False
) -> TrialRecord:
    """Train a trial from where it stands to its end, and write its record.

    `report` receives epoch (from 1) and the metrics of every validation, if the trial trains in this process;
    `may_stop` says whether there is early stopping.
    """
    record, folder = ledger.read(number), ledger.folder(number)
    record.started_at = record.started_at or time.time()
    record.status = "running"
    ledger.write(record)
    try:
        if may_stop:
            await_decision(folder, 0)  # one that an earlier session has made
        _train(space, ledger, record, report, may_stop=may_stop)
        record.status = "finished"
    except StoppedEarly:
        record.status = "stopped"
    except Exception as error:
        if _is_going_down(error):
            raise
        record.status, record.failure, record.reason = "failed", failure_kind(error), _reason(error)
    record.ended_at = time.time()
    summarise(record, folder, space.search)
    if record.status == "finished" and record.value is None:
        record.status, record.failure = "failed", "bad data"
        record.reason = f"no {space.search.metric} was measured: the validation images have nothing to measure it on"
    ledger.write(record)
    return record


def failure_kind(error: BaseException) -> FailureKind:
    kinds: list[tuple[type[BaseException], FailureKind]] = [
        (OutOfMemory, "out of memory"),
        (NonFiniteLoss, "loss not finite"),
        (WorkerLost, "worker lost"),
        (ImageError, "bad data"),
        (UserError, "impossible settings"),
    ]
    return next((kind for of_type, kind in kinds if isinstance(error, of_type)), "exception")


def _train(space: SearchSpace, ledger: Ledger, record: TrialRecord, report: Report, *, may_stop: bool) -> None:
    while True:
        config = space.trial_config(record.values, str(ledger.folder(record.number)))
        if record.retries:
            config = config.changed({f"training.{name}": record.retries[-1][name] for name in RETRY_KEYS})
        try:
            _start(config, report, may_stop=may_stop)
            return
        except OutOfMemory as error:
            if record.retries or not space.failures.retry_out_of_memory or config.training.batch_size in (1, "auto"):
                raise
            record.retries.append({"reason": _reason(error), **_half_the_batch(config)})
            ledger.write(record)
        _free_memory()


def _half_the_batch(config: Config) -> dict[str, int]:
    """Settings of a step of as many images, or nearly, in smaller batches."""
    training = config.training
    batch_size, batches = training.images_per_forward // 2, training.gradient_accumulation_steps
    if training.images_per_step is None:
        batches = -(-images_per_step(training, 1) // batch_size)
    return {"batch_size": batch_size, "gradient_accumulation_steps": batches}


def _start(config: Config, report: Report, *, may_stop: bool) -> None:
    """Train, from the last checkpoint if there is one."""
    folder = Path(config.output.output_dir)
    resume = bool(list_checkpoints(folder / "checkpoints"))
    if not resume:  # a killed attempt may have saved an adapter before its first checkpoint
        for name in ("best", "last"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if config.scaling.num_workers == 0:
        train(config, resume=resume, report=report)
        return
    from ray.tune.integration.ray_train import TuneReportCallback

    callbacks = [TuneReportCallback(), *([EndWhenDecided(folder)] if may_stop else [])]
    train(config, resume=resume, callbacks=callbacks)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_going_down(error: BaseException) -> bool:
    """Whether processes of the sweep itself are gone, for example a killed driver: not a failure of the trial."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ActorDiedError | ActorUnavailableError | RaySystemError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, UserError) or len(text) < _REASON_LENGTH else text[:_REASON_LENGTH] + " ..."


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
