"""Ray clusters: joining one or starting a local one, and whether it has room for the workers of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.errors import UserError
from sam3lora.local_ray import start_local_ray

if TYPE_CHECKING:
    from sam3lora.config import Config

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def ray_session(
    address: str | None, *, num_cpus: float, dashboard: bool = False, workers_ahead: bool = True
) -> Iterator[bool]:
    """Connect to the Ray cluster that is running or named, or to a new local one, for the duration of the block.

    Args:
        address: of a cluster; None takes `RAY_ADDRESS`, or starts a local Ray if that is not set.
        num_cpus: logical CPUs of a local Ray, however many the machine has.
        dashboard: start one with a local Ray. Ray Train needs it to free the reservations of a killed run.
        workers_ahead: a local Ray starts a process for each CPU at once.

    Yields:
        Whether it is a local one that ends with the block.

    Raises:
        UserError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address and address != "local":
        _join(address, quiet)
    else:
        address = "local"
        start_local_ray(num_cpus, dashboard=dashboard, workers_ahead=workers_ahead, **quiet)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def check_job_path(path: str | Path, option: str) -> None:
    """Refuse a relative path in a submitted job: its working directory is a temporary copy.

    Raises:
        UserError: This is such a job, and the path is relative; names the option.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(path).expanduser().is_absolute():
        raise UserError(
            f"{option} is {path}, but a submitted job runs in a temporary copy of the working directory: give {option} "
            "an absolute path on storage that all hosts see"
        )


def worker_resources(config: Config, *, use_gpu: bool) -> dict[str, float]:
    """The resources that one worker reserves: a CPU of its own, one for each of its data tasks, and its GPU."""
    resources = {"CPU": 1.0 + config.training.num_workers}
    if use_gpu:
        resources["GPU"] = 1.0
    return resources | config.scaling.resources_per_worker


def choose_gpu(config: Config) -> bool:
    """Whether workers train on GPUs.

    Raises:
        UserError: `scaling.use_gpu` and `scaling.resources_per_worker` contradict each other.
    """
    import ray

    wanted, asked = config.scaling.use_gpu, config.scaling.resources_per_worker.get("GPU")
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 or bool(asked) if wanted == "auto" else bool(wanted)
    if asked is not None and use_gpu != (asked > 0):
        raise UserError(
            f"scaling.resources_per_worker asks for {asked:g} GPUs, but scaling.use_gpu={str(wanted).lower()} trains "
            f"{'with' if use_gpu else 'without'} them: change one of the two"
        )
    return use_gpu


def check_room(config: Config, resources: dict[str, float]) -> None:
    """Refuse workers that no cluster node can hold; Ray itself would wait for them forever.

    Args:
        config: of the run.
        resources: of one worker, from `worker_resources`.

    Raises:
        UserError: the nodes of the cluster cannot hold the workers, whatever else runs on them.
    """
    import ray

    least, strategy = _least_workers(config), config.scaling.placement_strategy
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = [_places(node, resources) for node in nodes]
    room = {"STRICT_PACK": max(places, default=0), "STRICT_SPREAD": sum(map(bool, places))}.get(strategy, sum(places))
    if room < least:
        raise UserError(
            f"scaling.num_workers={least} with {in_words(resources)} for each worker: the cluster has room for {room} "
            f"(placement {strategy}, nodes with {'; '.join(map(in_words, nodes)) or 'nothing'}). Ask for fewer "
            f"workers{_cheaper(config, resources)}, or add to the cluster"
        )
    free = ray.available_resources()
    short = [name for name, amount in resources.items() if free.get(name, 0) < least * amount]
    if short:
        logger.warning("waiting for other work on the cluster to free %s for %d workers", ", ".join(short), least)


def most_workers(config: Config) -> int:
    """Number of workers of a run, the largest one if it is elastic."""
    return config.scaling.most_workers


def _least_workers(config: Config) -> int:
    workers = config.scaling.num_workers
    return workers if isinstance(workers, int) else workers[0]


def _places(node: dict[str, float], resources: dict[str, float]) -> int:
    """How many workers fit on an empty node."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in resources.items() if amount), default=10**6)


def _cheaper(config: Config, resources: dict[str, float]) -> str:
    """Further advice to the user: ", or ..." for each that applies."""
    hints = []
    if resources.get("GPU"):
        hints.append("set scaling.use_gpu=false")
    if "CPU" not in config.scaling.resources_per_worker:
        hints.append("let each share CPUs with its data tasks by scaling.resources_per_worker={CPU: 1}")
    return "".join(f", {hint}" for hint in hints)


def in_words(resources: dict[str, float]) -> str:
    """CPUs, GPUs and custom resources, without Ray's internal ones."""
    own = ("memory", "object_store_memory", "node:", "accelerator_type:")
    shown = {name: amount for name, amount in resources.items() if not name.startswith(own)}
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"cannot work through the Ray Client address {address}: submit a job on the cluster instead: "
            "ray job submit --working-dir . -- python jobs/train.py CONFIG, or jobs/validate.py, jobs/predict.py"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address for jobs (the dashboard's), not the cluster's own: submit a job to it by "
            f"ray job submit --address {address} --working-dir . -- python jobs/train.py CONFIG, or give HOST:6379 "
            "(auto on a host of the cluster) as RAY_ADDRESS or --address, or unset it to work on this machine alone"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:  # Ray itself would try for many minutes and ignore interrupts
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({error}): check scaling.address, --address or RAY_ADDRESS, and "
                "whether the cluster runs"
            ) from error
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"cannot join the Ray cluster at {address}: {error}. Expected auto or HOST:PORT, and for a cluster that "
            "asks for a token RAY_AUTH_MODE=token with the cluster's ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error
