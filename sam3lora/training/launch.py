"""`train`: prepares the run folder, starts the workers and collects the result."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.extras import check_extras
from sam3lora.files import check_folder, remove_leftovers, write_whole
from sam3lora.folder_lock import locked_folder
from sam3lora.garbage_collection import no_garbage_collection
from sam3lora.training.checkpoint_folders import list_checkpoints, read_state
from sam3lora.training.metrics_log import METRICS_FILE, append_line, follow, read_metrics, write_plots
from sam3lora.training.saved_run import refuse_changes

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Result of a run. ``history`` has one entry per validation with epoch, train_loss, valid_loss and metrics."""

    output_dir: Path
    best_adapter: Path
    last_adapter: Path
    best_loss: float | None
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    config: Config,
    *,
    resume: bool | Literal["anyway"] = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train an adapter as the configuration says and return where it is.

    ``resume`` continues from the last checkpoint in the run folder; without it the folder must not hold a run. Images,
    labels and the settings that decide what is learned have to be those of the run. With ``"anyway"`` other data,
    another seed and another loss are accepted: the epoch begins again, and ``best/`` is chosen anew. The folder is
    locked: no other process can train in it.
    ``report`` is called after each validation with step, epoch (from 1), loss and metrics, where training happens in
    this process (``scaling.num_workers`` 0). ``callbacks`` of Ray Train (``ray.train.UserCallback``) get the same
    values where workers train.

    Raises:
        UserError: a mistake in data, settings or cluster.
        RunFailed: (a RuntimeError) a loss that is not finite (`NonFiniteLoss`), too little memory (`OutOfMemory`) or
            space on the disk (`DiskFull`), workers lost more often than ``max_failures`` (`WorkerLost`), or SIGTERM
            (`RunStopped`), which saves first.
    """
    started = time.time()
    logging.getLogger("sam3lora").setLevel(config.logging.level)
    config.training.required_data_dir()
    check_extras(config)
    config = config.with_absolute_paths()
    output_dir = Path(config.output.output_dir)
    if resume:
        _last_checkpoint(output_dir)  # before the folder is made for the lock
    with locked_folder(output_dir, "training"):
        accepted_data = _prepare_folder(config, output_dir, resume)
        payload = {
            "config": config.model_dump(mode="json"),
            "use_ray": config.scaling.num_workers != 0,
            "resumed_from": _last_checkpoint(output_dir).name if resume else None,
            "accepted_data": accepted_data,
        }
        try:
            with follow(output_dir, config.logging.progress):
                outcome = _run(config, payload, report, callbacks)
        finally:
            remove_leftovers(output_dir, output_dir / "checkpoints")
    lines = read_metrics(output_dir / METRICS_FILE)
    if config.logging.plots:
        try:
            write_plots(lines, output_dir / "plots")
        except OSError as error:  # the run is complete without them
            logger.warning("the curves could not be drawn into %s: %s", output_dir / "plots", error.strerror)
    return TrainResult(
        output_dir=output_dir,
        best_adapter=output_dir / "best",
        last_adapter=output_dir / "last",
        best_loss=outcome.get("best_loss"),
        steps=outcome["step"],
        seconds=time.time() - started,
        history=[line for line in lines if line["kind"] == "epoch"],
    )


def _last_checkpoint(output_dir: Path) -> Path:
    saved = list_checkpoints(output_dir / "checkpoints")
    if not saved:
        raise UserError(
            f"nothing to resume: {output_dir / 'checkpoints'} holds no complete checkpoint; train without --resume"
        )
    return saved[-1]


def _prepare_folder(config: Config, output_dir: Path, resume: bool | Literal["anyway"]) -> dict[str, str] | None:
    """Refuse a folder whose content could be lost or mixed up, then write the configuration.

    A start that failed before its first checkpoint or adapter left nothing of value, so it may be repeated. Returns the
    digest of the data if other data are accepted.
    """
    checkpoints = output_dir / "checkpoints"
    if not resume and list_checkpoints(checkpoints):
        raise UserError(
            f"{output_dir} already holds a run: give --resume to go on with it, or another --output-dir for a new one"
        )
    if not resume and any(os.path.lexists(output_dir / name) for name in ("best", "last")):
        raise UserError(f"{output_dir} already holds an adapter of another run: give another --output-dir")
    if not resume:
        _refuse_foreign_files(output_dir)
    warning, data = _check_resume(config, output_dir, resume) if resume else (None, None)
    try:
        checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to output.output_dir {output_dir}: {error.strerror}") from error
    remove_leftovers(output_dir, checkpoints)
    for folder in (output_dir, checkpoints):
        check_folder(folder)
    if not resume:
        (output_dir / METRICS_FILE).write_text("")
    write_whole(output_dir / "config.yaml", config.to_yaml())
    if warning:
        logger.warning("%s", warning)
        append_line(output_dir / METRICS_FILE, "warning", message=warning)
    return data if resume == "anyway" else None


def _refuse_foreign_files(output_dir: Path) -> None:
    """Refuse a folder whose files a run would replace and that no run has written."""
    metrics, is_run = output_dir / METRICS_FILE, False
    if metrics.is_file():
        with contextlib.suppress(UnicodeDecodeError):
            first = next(iter(read_metrics(metrics)), None)
            is_run = metrics.stat().st_size == 0 or (isinstance(first, dict) and "kind" in first)
    for file in (output_dir / "config.yaml", metrics):
        if os.path.lexists(file) and not is_run:
            raise UserError(
                f"{file} was not written by a run, and training would replace it: give another --output-dir"
            )


def _check_resume(
    config: Config, output_dir: Path, resume: bool | Literal["anyway"]
) -> tuple[str | None, dict[str, str]]:
    """Compare the run in the folder with what it is to go on with: a warning, if any, and the digest of the data."""
    from sam3lora.training.datasets import data_digest, read_splits

    last = _last_checkpoint(output_dir)
    saved, data = read_state(last), data_digest(*read_splits(config))
    changes = saved.changes(config.model_dump(mode="json"), data)
    refuse_changes(last, changes, accepted=resume == "anyway")
    none_left = saved.why_no_step_left(config, anew=bool(changes))
    if none_left and resume == "anyway":
        raise UserError(f"no step is left of the run in {output_dir}: {none_left}")
    if none_left:
        return f"no step is left of this run, so nothing is trained: {none_left}", data
    if changes:
        return (
            f"resumed at step {saved.state.step}, from the start of epoch {saved.state.epoch + 1}, with changes: "
            f"{', '.join(changes)}. best/ is chosen anew"
        ), data
    otherwise = saved.changes_of_measuring(
        config.model_dump(mode="json"), with_metrics=bool(config.evaluation.every_epochs)
    )
    if otherwise:
        return (
            f"resumed at step {saved.state.step} with measurements that do not compare with those before: "
            f"{', '.join(otherwise)}. Where one of them decides best/, it is chosen anew"
        ), data
    unknown = []
    if saved.data is None:
        unknown.append("which images and labels the run had, so they were not compared")
    if saved.base is None:
        unknown.append("the fingerprint of its base model, so that only the name was compared")
    return f"{last} does not say {', nor '.join(unknown)}" if unknown else None, data


def _run(
    config: Config,
    payload: dict[str, Any],
    report: Callable[[dict[str, Any]], None] | None,
    callbacks: Sequence[Any],
) -> dict[str, Any]:
    if payload["use_ray"]:
        from sam3lora.training.on_ray import run_on_ray

        return run_on_ray(config, payload, callbacks)
    with no_garbage_collection():
        from sam3lora.training.worker import run_worker

    return run_worker(payload, report=report)
