"""An evaluation spread over Ray workers, one GPU or CPU each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sam3lora import cluster
from sam3lora.errors import UserError
from sam3lora.evaluate.answers import Answers
from sam3lora.evaluate.worker import EvaluationWorker

MAX_RESTARTS = 2


def ask_on_ray(
    make_worker: Callable[[], EvaluationWorker],
    batches: Sequence[Sequence[dict[str, Any]]],
    *,
    num_workers: int,
    use_gpu: bool,
    address: str | None = None,
) -> Iterator[tuple[dict[str, Answers], dict[str, Any]]]:
    """Answers to each batch as they come, in any order, with the worker's facts.

    A worker that dies is started again, and its batch with it.

    Args:
        make_worker: Called on each worker.
        batches: Records of the images of each batch.
        num_workers: How many workers.
        use_gpu: Give each a GPU.
        address: Of a Ray cluster; None takes `RAY_ADDRESS`, or starts a local Ray.

    Raises:
        UserError: No cluster answers, it has no room, or a worker met a user's mistake.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    class Actor:
        def __init__(self) -> None:
            self.worker = make_worker()

        def ask(self, records: Sequence[dict[str, Any]]):
            return self.worker.ask(records), self.worker.facts()

    with cluster.ray_session(address, num_cpus=num_workers):
        _check_room(num_workers, use_gpu)
        remote = ray.remote(Actor).options(
            num_cpus=1, num_gpus=int(use_gpu), max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )
        actors = [remote.remote() for _ in range(min(num_workers, len(batches)))]
        try:
            yield from ActorPool(actors).map_unordered(lambda actor, batch: actor.ask.remote(batch), batches)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise type(error.cause)(str(error.cause)) from None
            raise
        finally:
            for actor in actors:
                ray.kill(actor)


def _check_room(num_workers: int, use_gpu: bool) -> None:
    """Ray waits without end for what no node has."""
    import ray

    has = ray.cluster_resources()
    for name, needed in (("CPU", num_workers), ("GPU", num_workers * use_gpu)):
        if has.get(name, 0) < needed:
            raise UserError(
                f"--num-workers {num_workers} needs {needed} {name}s, the cluster has {has.get(name, 0):g}: "
                "ask for fewer"
            )
