"""A run on the workers of a Ray cluster: connecting, Ray Train's environment, signals."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.cluster import most_workers, ray_session, worker_resources
from sam3lora.config import Config
from sam3lora.files import scratch_folder
from sam3lora.local_ray import environment
from sam3lora.processes_ahead import start_ahead
from sam3lora.start_marks import mark
from sam3lora.training.imports import BEGIN
from sam3lora.training.sigterm import passed_on

if TYPE_CHECKING:
    from ray.train import UserCallback

# How often the workers and Ray ask whether a host is drained. Such a host starts no decoding tasks any more, so a run
# without another host goes on only as long as the batches last that were read ahead. Asking takes some milliseconds.
ASK_RAY_S = 1.0

# A worker answers Ray from a thread of its own, however long a step takes. One that is silent for so long is taken for
# dead, such as a stopped process; Ray's own default is ten minutes, in which all others would wait.
_SILENT_WORKER_S = 40


def run_on_ray(config: Config, payload: dict[str, Any], callbacks: Sequence[UserCallback] = ()) -> dict[str, Any]:
    """Train on the workers of a cluster and return what `run_worker` of the first one returned.

    The callbacks run in Ray Train's controller, after the run's own.

    Raises:
        UserError: a mistake that a worker met, or no room for the workers.
        RunFailed: a loss that is not finite, workers lost more often than `scaling.max_failures`, a lost controller of
            Ray Train's, or SIGTERM.
        RuntimeError: a fault in the program; the worker's traceback is its cause.
        KeyboardInterrupt: interrupted; the workers are gone.
    """
    storage = scratch_folder(Path(config.output.output_dir))
    cpus = most_workers(config) * worker_resources(config, use_gpu=False)["CPU"]
    session = ray_session(config.scaling.address, num_cpus=cpus, workers_ahead=False)
    with session as is_local, _environment(config, is_local):
        mark("Ray")
        if is_local:
            start_ahead(BEGIN, _variables_of_workers(), count=most_workers(config), made_by_actor=True)
        # Imported while the processes of a local Ray start; the workers alone import torch.
        import ray.train
        from ray.exceptions import RayActorError

        from sam3lora.training.ray_trainer import as_user_error, make_trainer

        trainer = make_trainer(config, payload, storage, callbacks, is_local=is_local)
        try:
            with _interruptible(), passed_on(Path(config.output.output_dir)):
                result: Any = trainer.fit()
        except (ray.train.TrainingFailedError, RayActorError) as error:
            raise as_user_error(error, config) from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if result.return_value is None:
        raise RuntimeError("the workers ended without a result")
    return result.return_value


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


def _variables_of_workers() -> dict[str, str]:
    """The environment variables that Ray Train gives its workers.

    To import its function would import all of Ray Train first, most of a second.
    """
    import ray

    constants = runpy.run_path(str(Path(ray.__file__).parent / "train/v2/_internal/constants.py"))
    return {
        constants["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR"]: "0",  # its controller's
        **constants["get_env_vars_to_propagate"](),
    }


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
