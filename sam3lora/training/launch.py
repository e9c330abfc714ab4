"""`train`: prepares the run folder, starts the workers and collects the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.extras import check_extras
from sam3lora.files import remove_leftovers, write_whole
from sam3lora.training.checkpoints import check_settings, list_checkpoints, read_state
from sam3lora.training.metrics_log import METRICS_FILE, follow, read_metrics, write_plots

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
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train an adapter as the configuration says and return where it is.

    ``resume`` continues from the last checkpoint in the run folder; without it the folder must not hold a run.
    ``report`` is called after each validation with step, epoch (from 1), loss and metrics, where training happens in
    this process (``scaling.num_workers`` 0). ``callbacks`` of Ray Train (``ray.train.UserCallback``) get the same
    values where workers train.

    Raises:
        UserError: a mistake in data, settings or cluster.
        RunFailed: (a RuntimeError) a loss that is not finite (`NonFiniteLoss`), too little memory (`OutOfMemory`), or
            workers lost more often than ``max_failures`` (`WorkerLost`).
    """
    started = time.time()
    logging.getLogger("sam3lora").setLevel(config.logging.level)
    config.training.required_data_dir()
    check_extras(config)
    config = config.with_absolute_paths()
    output_dir = Path(config.output.output_dir)
    _prepare_folder(config, output_dir, resume)
    payload = {"config": config.model_dump(mode="json"), "use_ray": config.scaling.num_workers != 0}
    try:
        with follow(output_dir, config.logging.progress):
            outcome = _run(config, payload, report, callbacks)
    finally:
        remove_leftovers(output_dir, output_dir / "checkpoints")
    lines = read_metrics(output_dir / METRICS_FILE)
    if config.logging.plots:
        write_plots(lines, output_dir / "plots")
    return TrainResult(
        output_dir=output_dir,
        best_adapter=output_dir / "best",
        last_adapter=output_dir / "last",
        best_loss=outcome.get("best_loss"),
        steps=outcome["step"],
        seconds=time.time() - started,
        history=[line for line in lines if line["kind"] == "epoch"],
    )


def _prepare_folder(config: Config, output_dir: Path, resume: bool) -> None:
    """Refuse a folder whose content could be lost or mixed up, then write the configuration.

    A start that failed before its first checkpoint or adapter left nothing of value, so it may be repeated.
    """
    checkpoints = output_dir / "checkpoints"
    saved = list_checkpoints(checkpoints)
    if resume and not saved:
        raise UserError(f"nothing to resume: {checkpoints} holds no complete checkpoint; train without --resume")
    if not resume and saved:
        raise UserError(
            f"{output_dir} already holds a run: give --resume to go on with it, or another --output-dir for a new one"
        )
    if not resume and any((output_dir / name).exists() for name in ("best", "last")):
        raise UserError(f"{output_dir} already holds an adapter of another run: give another --output-dir")
    if resume:
        check_settings(saved[-1], read_state(saved[-1])[0], config.model_dump(mode="json"))
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to output.output_dir {output_dir}: {error.strerror}") from error
    remove_leftovers(output_dir, checkpoints)
    write_whole(output_dir / "config.yaml", config.to_yaml())
    if not resume:
        (output_dir / METRICS_FILE).write_text("")


def _run(
    config: Config,
    payload: dict[str, Any],
    report: Callable[[dict[str, Any]], None] | None,
    callbacks: Sequence[Any],
) -> dict[str, Any]:
    if payload["use_ray"]:
        from sam3lora.training.on_ray import run_on_ray  # seconds of imports

        return run_on_ray(config, payload, callbacks)
    from sam3lora.training.trainer import run_worker

    return run_worker(payload, report=report)
