"""The Ray a run is trained on, and whether it has room for the workers."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from sam3lora import cluster
from sam3lora.config import Config
from sam3lora.errors import UserError

logger = logging.getLogger(__name__)


def ray_session(config: Config) -> AbstractContextManager[bool]:
    """The Ray that is running or configured, or a local one with room for the workers; see `cluster.ray_session`."""
    cpus = most_workers(config) * worker_resources(config, use_gpu=False)["CPU"]
    return cluster.ray_session(config.scaling.address, num_cpus=cpus)


def worker_resources(config: Config, *, use_gpu: bool) -> dict[str, float]:
    """What one worker reserves: a CPU of its own, one for each of its data tasks, and its GPU."""
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
    """Ray waits without end for resources that no node has: say what is missing at once.

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
    """Workers of a run; of an elastic one the largest number."""
    workers = config.scaling.num_workers
    return workers if isinstance(workers, int) else workers[1]


def _least_workers(config: Config) -> int:
    workers = config.scaling.num_workers
    return workers if isinstance(workers, int) else workers[0]


def _places(node: dict[str, float], resources: dict[str, float]) -> int:
    """How many workers an empty node holds."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in resources.items() if amount), default=10**6)


def _cheaper(config: Config, resources: dict[str, float]) -> str:
    """What else a user could change: ", or ..." as far as it applies."""
    hints = []
    if resources.get("GPU"):
        hints.append("set scaling.use_gpu=false")
    if "CPU" not in config.scaling.resources_per_worker:
        hints.append("let each share CPUs with its data tasks by scaling.resources_per_worker={CPU: 1}")
    return "".join(f", {hint}" for hint in hints)


def in_words(resources: dict[str, float]) -> str:
    """CPUs and GPUs, and whatever custom resources there are but Ray's own."""
    own = ("memory", "object_store_memory", "node:", "accelerator_type:")
    shown = {name: amount for name, amount in resources.items() if not name.startswith(own)}
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"
