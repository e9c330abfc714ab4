"""Starting a run: the run folder, Ray if none is there, a TorchTrainer, and what remains when it is over."""

from __future__ import annotations

import contextlib
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

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.train.checkpoints import list_checkpoints
from sam3lora.train.metrics import METRICS_FILE, read_metrics
from sam3lora.train.plots import write_plots
from sam3lora.train.progress import follow

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run left: ``history`` has one entry per validation with epoch, train_loss, valid_loss and metrics."""

    output_dir: Path
    best_adapter: Path
    last_adapter: Path
    best_loss: float | None
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)


def train(config: Config, *, resume: bool = False) -> TrainResult:
    """Train an adapter as the configuration says and return where it is.

    Args:
        config: from ``load_config``.
        resume: go on from the last checkpoint in the run folder; without it the folder must not hold a run.

    Raises:
        UserError: a mistake in data, settings or cluster.
        RuntimeError: training failed: a loss that is not finite, or workers lost more often than ``max_failures``.
    """
    started = time.time()
    logging.getLogger("sam3lora").setLevel(config.logging.level)
    output_dir = Path(config.output.output_dir).expanduser().absolute()
    data_dir = config.training.required_data_dir().absolute()
    config = config.model_copy(
        update={
            "output": config.output.model_copy(update={"output_dir": str(output_dir)}),
            "training": config.training.model_copy(update={"data_dir": str(data_dir)}),
        }
    )
    _prepare_folder(config, output_dir, resume)
    payload = {"config": config.model_dump(mode="json"), "use_ray": config.scaling.num_workers != 0}
    with follow(output_dir, config.logging.progress):
        outcome = _run_with_ray(config, payload) if payload["use_ray"] else _run_here(payload)
    if "failure" in outcome:
        failure = outcome["failure"]
        raise (UserError if failure["user"] else RuntimeError)(failure["message"])
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
    checkpoints = output_dir / "checkpoints"
    exists = (output_dir / "config.yaml").exists() or list_checkpoints(checkpoints)
    if exists and not resume:
        raise UserError(
            f"{output_dir} already holds a run: give --resume to go on with it, or another --output-dir for a new one"
        )
    if resume and not list_checkpoints(checkpoints):
        raise UserError(f"nothing to resume: {checkpoints} holds no complete checkpoint; train without --resume")
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "failure.json").unlink(missing_ok=True)
    for leftover in [*checkpoints.glob(".*.tmp"), *output_dir.glob(".*.tmp")]:  # of a writer that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    (output_dir / "config.yaml").write_text(config.to_yaml())
    if not resume:
        (output_dir / METRICS_FILE).write_text("")


def _run_here(payload: dict[str, Any]) -> dict[str, Any]:
    from sam3lora.train.worker import NonFiniteLoss, run_worker

    try:
        return run_worker(payload)
    except NonFiniteLoss as error:
        return {"failure": {"message": str(error), "user": False}}


def _run_with_ray(config: Config, payload: dict[str, Any]) -> dict[str, Any]:
    from sam3lora.train.worker import read_failure

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.scaling.worker_start_timeout_s))
    with ray_session(config) as cluster:
        use_gpu = _use_gpu(config, cluster)
        _check_cluster(config, cluster, use_gpu)
        storage = Path(config.output.output_dir) / ".ray"
        import ray.train
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        scaling = config.scaling
        trainer = TorchTrainer(
            _worker_entry,
            train_loop_config=payload,
            scaling_config=ScalingConfig(
                num_workers=scaling.num_workers,
                use_gpu=use_gpu,
                resources_per_worker=scaling.resources_per_worker or None,
                placement_strategy=scaling.placement_strategy,
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            # A name used twice would silently resume Ray's own bookkeeping; ours is in checkpoints/.
            run_config=RunConfig(
                name=f"run_{uuid.uuid4().hex[:8]}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=scaling.max_failures),
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            failure = read_failure(Path(config.output.output_dir))
            if failure is None:
                raise RuntimeError(
                    f"training failed after {scaling.max_failures} restarts: {_root_cause(error)}. "
                    "Everything up to the last checkpoint is kept: train again with --resume"
                ) from error
            outcome = {"failure": failure}
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    return outcome or {"failure": {"message": "the workers ended without a result", "user": False}}


def _worker_entry(payload: dict[str, Any]) -> dict[str, Any]:
    from sam3lora.train.worker import run_worker

    return run_worker(payload)


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[dict[str, float]]:
    """The resources of the Ray that is running or configured, or of a local one for the duration of the block."""
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    address = config.scaling.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address and address != "local":
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"cannot reach the Ray cluster at {address}: {error}") from error
    else:
        workers = _most_workers(config)
        cpus = _worker_cpus(config) * workers + config.training.num_workers * workers + 1
        # Logical CPUs: data tasks must find room beside the workers, also on a small machine.
        ray.init(
            address="local", num_cpus=int(cpus + 0.999), include_dashboard=False, object_store_memory=_store(), **quiet
        )
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _most_workers(config: Config) -> int:
    workers = config.scaling.num_workers
    return workers if isinstance(workers, int) else workers[1]


def _least_workers(config: Config) -> int:
    workers = config.scaling.num_workers
    return workers if isinstance(workers, int) else workers[0]


def _worker_cpus(config: Config) -> float:
    return config.scaling.resources_per_worker.get("CPU", 1.0)


def _store() -> int:
    """Bytes of a local object store: decoded batches in flight are all it holds."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(4e9, max(3e8, 0.15 * total)))


def _use_gpu(config: Config, cluster: dict[str, float]) -> bool:
    wanted = config.scaling.use_gpu
    return cluster.get("GPU", 0) > 0 if wanted == "auto" else bool(wanted)


def _check_cluster(config: Config, cluster: dict[str, float], use_gpu: bool) -> None:
    """Ray waits without end for resources that no node has: say what is missing at once."""
    least = _least_workers(config)
    gpus = least * config.scaling.resources_per_worker.get("GPU", 1.0 if use_gpu else 0.0)
    if use_gpu and cluster.get("GPU", 0) < gpus:
        raise UserError(
            f"scaling.num_workers={least} needs {gpus:g} GPUs, the cluster has {cluster.get('GPU', 0):g}: "
            "ask for fewer workers, or set scaling.use_gpu=false"
        )
    needed = least * _worker_cpus(config) + 1
    if cluster.get("CPU", 0) < needed:
        raise UserError(
            f"{least} workers and their data tasks need {needed:g} CPUs, the cluster has {cluster.get('CPU', 0):g}: "
            "ask for fewer workers, or start Ray with a higher --num-cpus"
        )


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [str(failure).strip().splitlines()[-1] for failure in failures.values() if str(failure).strip()]
    return causes[0] if causes else str(error).strip().splitlines()[-1]


def describe(result: TrainResult) -> str:
    """A few lines for people about a finished run."""
    best = f"{result.best_loss:.4g}" if result.best_loss is not None else "none"
    return json.dumps({"adapter": str(result.best_adapter), "best_loss": best, "seconds": round(result.seconds)})
