"""A run as a Ray Train job: its workers, its environment, and its errors in the user's terms."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchTrainer

from sam3lora.cluster import check_room, choose_gpu, environment, most_workers, ray_session, worker_resources
from sam3lora.config import Config
from sam3lora.errors import RunFailed, UserError, WorkerLost, WorkerStopped
from sam3lora.files import scratch_folder
from sam3lora.start_marks import mark
from sam3lora.training.network import TorchOnRayNetwork
from sam3lora.training.notices import ASK_RAY_S, passed_on

# A worker answers Ray from a thread of its own, however long a step takes. One that is silent for so long is taken for
# dead, such as a stopped process; Ray's own default is ten minutes, in which all others would wait.
_SILENT_WORKER_S = 40

# After a failure the workers get so long to leave the process group before they are killed; one that is stopped never
# does, and the run waits for it.
_LEAVING_S = 5


def run_on_ray(config: Config, payload: dict[str, Any], callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Train on the workers of a cluster and return what `run_worker` of the first one returned.

    The callbacks run in Ray Train's controller, after the run's own.

    Raises:
        UserError: a mistake that a worker met, or no room for the workers.
        RunFailed: a loss that is not finite, workers lost more often than `scaling.max_failures`, or SIGTERM.
        RuntimeError: a fault in the program; the worker's traceback is its cause.
        KeyboardInterrupt: interrupted; the workers are gone.
    """
    storage = scratch_folder(Path(config.output.output_dir))
    cpus = most_workers(config) * worker_resources(config, use_gpu=False)["CPU"]
    session = ray_session(config.scaling.address, num_cpus=cpus)
    with session as is_local, _environment(config, is_local):
        mark("Ray")
        trainer = _trainer(config, payload, storage, callbacks)
        try:
            with _interruptible(), passed_on(Path(config.output.output_dir)):
                result: Any = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise as_user_error(error, config) from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if result.return_value is None:
        raise RuntimeError("the workers ended without a result")
    return result.return_value


class EndOnMistake(UserCallback):
    """Ends the run at the first mistake in data or settings, which every further attempt would meet again.

    It runs in Ray Train's controller, where an exception is final; Ray Train retries those of workers.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(_LEAVING_S))  # the controller's alone
        for error in worker_exceptions.values():
            if isinstance(error, UserError | RunFailed):
                raise error


def _trainer(config: Config, payload: dict[str, Any], storage: Path, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    scaling, use_gpu = config.scaling, choose_gpu(config)
    resources = worker_resources(config, use_gpu=use_gpu)
    check_room(config, resources)
    # Counts are exchanged as CPU tensors; NCCL takes no two workers on one GPU.
    whole_gpus = use_gpu and resources["GPU"] >= 1
    # As keywords: to type checkers ray.train shows the classes of its first version.
    workers: dict[str, Any] = {"num_workers": scaling.num_workers, "resources_per_worker": resources}
    run: dict[str, Any] = {
        # Under a name used before, Ray would silently resume from its own records; our checkpoints are in checkpoints/.
        "name": f"run_{uuid.uuid4().hex[:8]}",
        "storage_path": str(storage),
        "failure_config": FailureConfig(max_failures=scaling.max_failures),
        "callbacks": [EndOnMistake(), *callbacks],
    }
    options: dict[str, Any] = {
        "train_loop_config": payload,
        "scaling_config": ScalingConfig(use_gpu=use_gpu, placement_strategy=scaling.placement_strategy, **workers),
        "torch_config": TorchOnRayNetwork(backend="cpu:gloo,cuda:nccl" if whole_gpus else "gloo"),
        "run_config": RunConfig(**run),
    }
    entry: Any = worker_entry
    return TorchTrainer(entry, **options)


def worker_entry(payload: dict[str, Any]) -> dict[str, Any]:
    mark("training worker")
    output_dir = Path(payload["config"]["output"]["output_dir"])
    if not (output_dir / "config.yaml").is_file():
        raise UserError(
            f"the worker on host {socket.gethostname()} does not see the run folder {output_dir}: give an "
            "--output-dir on storage that all hosts of the cluster share"
        )
    from sam3lora.training.worker import run_worker

    return run_worker(payload)


def as_user_error(error: ray.train.TrainingFailedError, config: Config) -> Exception:
    """The exception to raise for a failed training: the user's own mistake where there is one, else what happened."""
    cause: Any = error
    while isinstance(cause, ray.train.ControllerError):
        cause = cause.controller_failure
    if isinstance(cause, UserError | RunFailed):
        return cause
    kept = "Everything up to the last checkpoint is kept: train again with --resume"
    if not isinstance(cause, ray.train.WorkerGroupError):
        return RuntimeError(f"Ray Train failed: {_last_line(cause)}. {kept}")
    failures = cause.worker_failures
    lost = {rank: failure for rank, failure in failures.items() if _is_loss(failure)}
    if not lost:
        return RuntimeError(f"training failed: {_last_line(next(iter(failures.values())))}. {kept}")
    restarts = config.scaling.max_failures
    return WorkerLost(
        f"worker {', '.join(map(str, lost))} was lost and scaling.max_failures={restarts} allows no further restart: "
        f"{_last_line(next(iter(lost.values())))} {kept}"
    )


def _is_loss(failure: Exception) -> bool:
    """Whether a worker is gone: Ray Train's own exceptions mean that; the training function raised all others."""
    return isinstance(failure, WorkerStopped) or type(failure).__module__.startswith("ray.train.")


def _last_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _environment(config: Config, is_local: bool) -> AbstractContextManager[None]:
    """Settings that Ray Train reads from the environment, for this run only."""
    names = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(config.scaling.worker_start_timeout_s)}
    for name, seconds in {  # a user's own setting goes first
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": _SILENT_WORKER_S,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": 0.5,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": ASK_RAY_S,
    }.items():
        names[name] = os.environ.get(name, str(seconds))
    if is_local:  # nobody preempts this machine
        names["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return environment(names)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt again.

    Ray Train's handler stops the workers, exits with success, and stays in place afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)
