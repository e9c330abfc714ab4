"""How many trials run at a time: as many as the cluster has room for, so that none waits for another's resources."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sam3lora.cluster import check_room, choose_gpu, in_words, most_workers, worker_resources
from sam3lora.config import Config
from sam3lora.errors import UserError

_MOST_TRIALS = 1000

DRIVER_RESOURCES = {"memory": 1.0}
"""Resources of a trial's own process, beside its workers: next to none, but Ray Tune refuses an empty request. A share
of a CPU would leave too little for the last worker of a cluster whose CPUs are all in use."""


@dataclass(frozen=True)
class Concurrency:
    """The number of trials at a time, and its reason."""

    trials: int
    reason: str


def trial_needs(config: Config, *, use_gpu: bool) -> list[dict[str, float]]:
    """Resources of each process that trains in a trial: its Ray Train workers, or the trial's own one without them."""
    if config.scaling.num_workers == 0:
        resources = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {})
        return [resources | config.scaling.resources_per_worker]
    return [worker_resources(config, use_gpu=use_gpu)] * most_workers(config)


def local_cpus(config: Config, concurrent: int) -> float:
    """Logical CPUs of a local Ray for this number of trials; there may be more of them than real ones."""
    return concurrent * sum(need.get("CPU", 0.0) for need in trial_needs(config, use_gpu=False))


def local_concurrency(config: Config, asked: int | None) -> Concurrency:
    """Trials at a time on this machine alone, before any Ray is started."""
    import torch

    gpus, cpus, wanted = torch.cuda.device_count(), os.cpu_count() or 1, config.scaling.use_gpu
    use_gpu = gpus > 0 if wanted == "auto" else bool(wanted)
    name, number = ("GPU", gpus) if use_gpu else ("CPU", cpus)
    each = sum(need.get(name, 0.0) for need in trial_needs(config, use_gpu=use_gpu))
    room = int(number / max(each, 1e-9) + 1e-9)
    # More trials may share the CPUs than there are, but not the GPUs.
    return _limited(room, asked, f"{number} {name}{'s' * (number != 1)}", at_most=max(room, 1) if use_gpu else None)


def choose_concurrency(config: Config, asked: int | None) -> Concurrency:
    """Trials at a time on the Ray that is running: as many as there is room for, at most `asked`.

    Raises:
        UserError: The cluster cannot hold a single trial.
    """
    import ray

    use_gpu = choose_gpu(config)
    needs = trial_needs(config, use_gpu=use_gpu)
    if config.scaling.num_workers != 0:
        check_room(config, needs[0])
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    room = trials_that_fit(nodes, needs, config.scaling.placement_strategy)
    if room == 0:
        raise UserError(
            f"a trial needs {in_words(needs[0])}{f' for each of {len(needs)} workers' if len(needs) > 1 else ''}: no "
            f"node has that (there are nodes with {'; '.join(map(in_words, nodes))}). Change "
            "scaling.resources_per_worker or --device, or add to the cluster"
        )
    return _limited(room, asked, f"the cluster has room for {room}", at_most=room)


def trials_that_fit(
    nodes: list[dict[str, float]], needs: list[dict[str, float]], placement_strategy: str = "PACK"
) -> int:
    """How many whole trials empty nodes hold; each worker is placed on the first node with room.

    Ray's "STRICT_PACK" puts all workers of a trial on one node, "STRICT_SPREAD" each on another.
    """
    if placement_strategy == "STRICT_PACK":
        names = {name for need in needs for name in need}
        needs = [{name: sum(need.get(name, 0.0) for need in needs) for name in names}]
    free = [dict(node) for node in nodes]
    for fitting in range(_MOST_TRIALS):
        used: list[int] = []
        for need in needs:
            barred = used if placement_strategy == "STRICT_SPREAD" else []
            place = next((n for n, node in enumerate(free) if n not in barred and _fits(need, node)), None)
            if place is None:
                return fitting
            used.append(place)
            for name, amount in need.items():
                free[place][name] = free[place].get(name, 0.0) - amount
    return _MOST_TRIALS


def _fits(need: dict[str, float], node: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in need.items() if amount)


def _limited(room: int, asked: int | None, there: str, *, at_most: int | None) -> Concurrency:
    if asked is None:
        return Concurrency(max(room, 1), there)
    if at_most is not None and asked > at_most:
        return Concurrency(at_most, f"{there}, fewer than the {asked} asked for")
    return Concurrency(asked, "as asked")
