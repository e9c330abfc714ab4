"""A run as a job of Ray Train: its workers, and its errors in the user's terms."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S

from sam3lora.cluster import check_room, choose_gpu, worker_resources
from sam3lora.config import Config
from sam3lora.errors import RunFailed, UserError, WorkerLost, WorkerStopped
from sam3lora.processes_ahead import calls
from sam3lora.training.imports import BEGIN
from sam3lora.training.local_trainer import LocalTrainer, PlainTrainer
from sam3lora.training.network import TorchOnRayNetwork

# After a failure the workers get so long to leave the process group before they are killed; one that is stopped never
# does, and the run waits for it.
_LEAVING_S = 5


class EndOnMistake(UserCallback):
    """Ends the run at the first mistake in data or settings, which every further attempt would meet again.

    It runs in Ray Train's controller, where an exception is final; Ray Train retries those of workers.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(_LEAVING_S))  # the controller's alone
        for error in worker_exceptions.values():
            if isinstance(error, UserError | RunFailed):
                raise error


def make_trainer(
    config: Config, payload: dict[str, Any], storage: Path, callbacks: Sequence[UserCallback], *, is_local: bool
) -> PlainTrainer:
    """The job of this configuration for the Ray that runs.

    Args:
        payload: What `run_worker` gets.
        storage: Folder for Ray Train's own records.
        is_local: Ray was started for this run, and ends with it.

    Raises:
        UserError: No room for the workers.
    """
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
        "worker_runtime_env": {"env_vars": calls(BEGIN) if is_local else {}},
    }
    options: dict[str, Any] = {
        "train_loop_config": payload,
        "scaling_config": ScalingConfig(use_gpu=use_gpu, placement_strategy=scaling.placement_strategy, **workers),
        "backend_config": TorchOnRayNetwork(backend="cpu:gloo,cuda:nccl" if whole_gpus else "gloo"),
        "run_config": RunConfig(**run),
    }
    entry: Any = worker_entry
    return (LocalTrainer if is_local else PlainTrainer)(entry, **options)


def worker_entry(payload: dict[str, Any]) -> dict[str, Any]:
    output_dir = Path(payload["config"]["output"]["output_dir"])
    if not (output_dir / "config.yaml").is_file():
        raise UserError(
            f"the worker on host {socket.gethostname()} does not see the run folder {output_dir}: give an "
            "--output-dir on storage that all hosts of the cluster share"
        )
    from ray.train.torch import TorchConfig

    from sam3lora.training.worker import run_worker

    with TorchConfig().train_func_context():  # chooses this worker's GPU
        return run_worker(payload)


def as_user_error(error: ray.train.TrainingFailedError | RayActorError, config: Config) -> Exception:
    """The exception to raise for a failed training: the user's own mistake where there is one, else what happened."""
    cause: Any = error
    while isinstance(cause, ray.train.ControllerError):
        cause = cause.controller_failure
    if isinstance(cause, UserError | RunFailed):
        return cause
    kept = "Everything up to the last checkpoint is kept: train again with --resume"
    if isinstance(cause, RayActorError):
        told = f"Ray Train's controller, which runs on this host, was lost: {_last_line(cause)}"
        if "never ran" in told:
            kept = "A Python process keeps the authentication of its first Ray: if that changed, start a new process"
        return RunFailed(f"{told} {kept}")
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
