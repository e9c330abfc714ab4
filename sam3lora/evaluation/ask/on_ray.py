"""An evaluation spread over Ray workers, one GPU or CPU each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sam3lora import cluster
from sam3lora.errors import RunFailed, UserError
from sam3lora.evaluation.ask.worker import Batches

MAX_RESTARTS = 2


def ask_on_ray(
    make_worker: Callable[[], Any],
    batches: Batches,
    *,
    num_workers: int | None = None,
    use_gpu: bool | None = None,
    address: str | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The answers to each batch as they come, in any order, with the worker's facts.

    A worker that dies is started again, and its batch with it.

    Args:
        make_worker: Called on each worker: an object with `ask(records)` and `facts()`.
        num_workers: None takes one for each GPU of the cluster, or one.
        use_gpu: Give each a GPU; None does so if the cluster has any.
        address: Of a Ray cluster; None takes `RAY_ADDRESS`, or starts a local Ray with two workers or one for each CPU.

    Raises:
        UserError: No cluster answers, it has no room, or a worker met a user's mistake.
        RunFailed: Workers died again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util import ActorPool

    class Actor:
        """Loads when it is first asked: what goes wrong then arrives as itself, unlike an error of a constructor."""

        worker: Any = None

        def ask(self, records: Sequence[dict[str, Any]]):
            self.worker = self.worker or make_worker()
            return self.worker.ask(records), self.worker.facts()

    most = len(batches) if num_workers is None else min(num_workers, len(batches))
    with cluster.ray_session(address, num_cpus=min(most, max(2, os.cpu_count() or 1))):
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        use_gpu = num_gpus > 0 if use_gpu is None else use_gpu
        num_workers = min(most, (num_gpus if use_gpu else 1) if num_workers is None else most)
        _check_room(num_workers, use_gpu)
        remote = ray.remote(Actor).options(
            num_cpus=1, num_gpus=int(use_gpu), max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )
        actors: list[Any] = [remote.remote() for _ in range(num_workers)]
        try:
            # A batch is made when a worker is free for it.
            ask = lambda actor, number: actor.ask.remote(batches[number])  # noqa: E731
            yield from ActorPool(actors).map_unordered(ask, list(range(len(batches))))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise type(error.cause)(str(error.cause)) from None
            raise
        except RayError as error:
            raise RunFailed(
                f"workers died {MAX_RESTARTS + 1} times over the same images, perhaps for want of memory: try fewer "
                f"images at a time (--batch-size) or fewer workers (--num-workers). Ray says: {error}"
            ) from error
        finally:
            for actor in actors:
                actor.__ray_terminate__.options(max_task_retries=0).remote()


def _check_room(num_workers: int, use_gpu: bool) -> None:
    """Ray waits without end for what no node has."""
    import ray

    has = ray.cluster_resources()
    for name, needed in (("CPU", num_workers), ("GPU", num_workers * use_gpu)):
        if has.get(name, 0) < needed:
            raise UserError(
                f"{num_workers} workers need {needed} {name}s, Ray has {has.get(name, 0):g}: take fewer (--num-workers)"
            )
