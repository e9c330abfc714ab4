"""The ingress's side of the segmenter replicas: affinity, time limits, cancellation, and one more try when one dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import grpc
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from serve_app.calls import AdapterInfo, ImageFile, ImageReply, SegmentCall, SegmentReply
from serve_app.http.errors import ServeError
from serve_app.settings import ServeSettings

SURVEY_TIMEOUT_S = 5.0  # for questions that every replica answers from memory
PATIENCE_S = 3.0  # until such a question finds a replica
RETRY_AFTER_S = 2.0
_NO_REPLICA = (DeploymentUnavailableError, ReplicaUnavailableError)
_REPLICA_FAILED = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    grpc.aio.AioRpcError,
    RequestCancelledError,
)

T = TypeVar("T")


class Backend(Protocol):
    """Who answers the ingress's questions. Failures that clients may see are returned; what is raised is a bug."""

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError: ...

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError: ...

    async def list_adapters(self) -> list[AdapterInfo] | ServeError: ...

    async def metrics(self) -> dict[str, str]:
        """Replica -> its metrics in the Prometheus text format."""
        ...

    async def ready(self) -> bool:
        """Whether some replica can answer."""
        ...


class ServeBackend:
    """A `Backend` of Serve replicas.

    Args:
        handle: Of the segmenter deployment. Its router should send equal `session_id`s to the same replica. Its class
            has `segment(call)`, `keep_image(image, timeout_s)`, `list_adapters()`, `ready()` and `named_metrics()`,
            which gives the replica's name and its metrics.
        settings: Of the service.
    """

    def __init__(self, handle: DeploymentHandle, settings: ServeSettings) -> None:
        self._handle = handle
        self._overload_type = "too_many_requests" if settings.limits.overload_status == 429 else "overloaded"

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).segment.remote(replace(call, timeout_s=timeout_s))

        return await self._ask(send, call.affinity, call.timeout_s)

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).keep_image.remote(image, timeout_s)

        return await self._ask(send, image.key, timeout_s)

    async def list_adapters(self) -> list[AdapterInfo] | ServeError:
        answers = await self._survey("list_adapters")
        lists = [answer for answer in answers if isinstance(answer, list)]
        if not lists:
            failures = (answer for answer in answers if isinstance(answer, ServeError))
            return next(failures, _not_ready())
        return _joined(lists)

    async def metrics(self) -> dict[str, str]:
        return dict(answer for answer in await self._survey("named_metrics") if isinstance(answer, tuple))

    async def ready(self) -> bool:
        return any(answer is True for answer in await self._survey("ready"))

    async def _ask(self, send: Callable[[str, float], Any], affinity: str, timeout_s: float) -> Any:
        """The reply of one replica, or of another if the first dies meanwhile."""
        deadline = time.monotonic() + timeout_s
        failed = False
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await _answer(send(affinity, timeout_s))
                except _ReplicaFailed:
                    failed = True
                # The router may not have noticed yet: another key leads elsewhere.
                return await _answer(send(f"{affinity} again", max(0.0, deadline - time.monotonic())))
        except _ReplicaFailed:
            return _replica_failed()
        except TimeoutError:
            return _replica_failed() if failed else _timeout(timeout_s)
        except BackPressureError as error:
            return ServeError(
                self._overload_type,
                "more requests are waiting than the service takes: try again later",
                error.retry_after_s or RETRY_AFTER_S,
            )
        except _NO_REPLICA:
            return _not_ready()

    async def _survey(self, method: str) -> list[Any]:
        """The answers of all replicas; of those that fail or are late, none."""
        patience = time.monotonic() + PATIENCE_S
        while True:
            try:
                answers = await self._handle.broadcast(method).results_async(
                    timeout_s=SURVEY_TIMEOUT_S, return_exceptions=True
                )
                break
            except (TimeoutError, *_REPLICA_FAILED):
                return []
            except _NO_REPLICA:
                # Serve takes a replica out of its list while it takes over a new user_config.
                if time.monotonic() > patience:
                    return []
                await asyncio.sleep(0.05)
        return [answer for answer in answers if not isinstance(answer, BaseException) or isinstance(answer, ServeError)]


class _ReplicaFailed(Exception):
    pass


async def _answer(response: Awaitable[T]) -> T:
    """Await a `DeploymentResponse`; the replica stops working on it when nobody waits any more.

    Raises:
        _ReplicaFailed: The replica died, or it left the call undone.
    """
    try:
        return await response
    except _REPLICA_FAILED as error:
        raise _ReplicaFailed from error
    except RuntimeError as error:
        if str(error).startswith("Unexpected error (StatusCode."):  # Serve's words for a gRPC call without an answer
            raise _ReplicaFailed from error
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            response.cancel()  # type: ignore[attr-defined]
            raise
        raise _ReplicaFailed from error  # Serve cancelled it, as it does when a replica shuts down


def _joined(lists: list[list[AdapterInfo]]) -> list[AdapterInfo]:
    """What the replicas know of each adapter; it is resident if some replica holds it."""
    joined: dict[str, AdapterInfo] = {}
    for info in (info for infos in lists for info in infos):
        known = joined.get(info.id)
        if known is None or (info.resident and not known.resident):
            joined[info.id] = info
    return [joined[id] for id in sorted(joined)]


def _replica_failed() -> ServeError:
    return ServeError("replica_failed", "the replica that worked on the request died: try again", RETRY_AFTER_S)


def _not_ready() -> ServeError:
    return ServeError("not_ready", "no replica is ready yet: try again in a few seconds", RETRY_AFTER_S)


def _timeout(timeout_s: float) -> ServeError:
    return ServeError("timeout", f"no answer within {timeout_s:.3g} s: try again later or with fewer prompts")
