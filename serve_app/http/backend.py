"""Calls from the ingress to the model replicas: affinity, time limits, cancellation, one retry when a replica dies."""

from __future__ import annotations

import asyncio
import re
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

from serve_app.http.errors import ServeError
from serve_app.messages import (
    EVERY_ADAPTER,
    AdapterPage,
    AdapterQuery,
    AdapterRow,
    DenseCall,
    DenseReply,
    ImageFile,
    ImageReply,
    RefineCall,
    RefineReply,
    SegmentCall,
    SegmentReply,
)
from serve_app.settings import MESSAGE_LENGTH_VARIABLE, ServeSettings

BROADCAST_TIMEOUT_S = 5.0  # for calls that every replica answers from memory
NO_REPLICA_TIMEOUT_S = 3.0  # until such a call finds a replica
RETRY_AFTER_S = 2.0
_NO_REPLICA = (DeploymentUnavailableError, ReplicaUnavailableError)
_REPLICA_FAILED = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    grpc.aio.AioRpcError,
    RequestCancelledError,
)

_UNEXPECTED = re.compile(r"Unexpected error \(StatusCode\.(\w+)")  # Serve's words for a gRPC call without an answer

T = TypeVar("T")


class Backend(Protocol):
    """Answers the calls of the ingress. Errors for the client are returned; an exception is a bug."""

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError: ...

    async def label(self, call: DenseCall) -> DenseReply | ServeError: ...

    async def refine(self, call: RefineCall) -> RefineReply | ServeError: ...

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError: ...

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage | ServeError: ...

    async def metrics(self) -> dict[str, str]:
        """Replica -> its metrics in the Prometheus text format."""
        ...

    async def ready(self) -> bool:
        """Whether some replica can answer."""
        ...


class ServeBackend:
    """A `Backend` of `ModelReplica`s; the handle's router should send equal `session_id`s to the same one."""

    def __init__(self, handle: DeploymentHandle, settings: ServeSettings) -> None:
        self._handle = handle
        self._overload_type = "too_many_requests" if settings.limits.overload_status == 429 else "overloaded"

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).segment.remote(replace(call, timeout_s=timeout_s))

        return await self._ask(send, call.affinity, call.timeout_s)

    async def label(self, call: DenseCall) -> DenseReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).label.remote(replace(call, timeout_s=timeout_s))

        return await self._ask(send, call.affinity, call.timeout_s)

    async def refine(self, call: RefineCall) -> RefineReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).refine.remote(replace(call, timeout_s=timeout_s))

        return await self._ask(send, call.affinity, call.timeout_s)

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        def send(affinity: str, timeout_s: float) -> Any:
            return self._handle.options(session_id=affinity).keep_image.remote(image, timeout_s)

        return await self._ask(send, image.key, timeout_s)

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage | ServeError:
        answers = await self._ask_all("list_adapters", query)
        pages = [answer for answer in answers if isinstance(answer, AdapterPage)]
        if not pages:
            failures = (answer for answer in answers if isinstance(answer, ServeError))
            return next(failures, _not_ready())
        return _joined(pages, query.limit)

    async def metrics(self) -> dict[str, str]:
        return dict(answer for answer in await self._ask_all("named_metrics") if isinstance(answer, tuple))

    async def ready(self) -> bool:
        return any(answer is True for answer in await self._ask_all("ready"))

    async def _ask(self, send: Callable[[str, float], Any], affinity: str, timeout_s: float) -> Any:
        """The reply of one replica, or of another one if the first dies meanwhile."""
        deadline = time.monotonic() + timeout_s
        failed = False
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await _answer(send(affinity, timeout_s))
                except _ReplicaFailed:
                    failed = True
                # The router may not know yet that the replica died: another key leads to another one.
                return await _answer(send(f"{affinity} again", max(0.0, deadline - time.monotonic())))
        except _ReplicaFailed:
            return _replica_failed()
        except _MessageRefused:
            return ServeError(
                "internal",
                "a message between the service's processes was refused for its size: its operator has to raise "
                f"{MESSAGE_LENGTH_VARIABLE} on every host",
            )
        except TimeoutError:
            if failed:
                return _replica_failed()
            return ServeError("timeout", f"no answer within {timeout_s:.3g} s: try again later or with fewer prompts")
        except BackPressureError as error:
            return ServeError(
                self._overload_type,
                "more requests are waiting than the service takes: try again later",
                error.retry_after_s or RETRY_AFTER_S,
            )
        except _NO_REPLICA:
            return _not_ready()

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all replicas; those that fail or are late are left out."""
        give_up_at = time.monotonic() + NO_REPLICA_TIMEOUT_S
        while True:
            try:
                answers = await self._handle.broadcast(method, *arguments).results_async(
                    timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True
                )
                break
            except TimeoutError:
                return [
                    ServeError("timeout", f"no answer within {BROADCAST_TIMEOUT_S:g} s: ask for a part, or try later")
                ]
            except _REPLICA_FAILED:
                return []
            except _NO_REPLICA:
                # Serve takes a replica off its list while the replica applies a new user_config.
                if time.monotonic() > give_up_at:
                    return []
                await asyncio.sleep(0.05)
        return [answer for answer in answers if not isinstance(answer, BaseException) or isinstance(answer, ServeError)]


class _ReplicaFailed(Exception):
    pass


class _MessageRefused(Exception):
    """gRPC refused a message for its size: the replica lives, and the same message would be refused again."""


async def _answer(response: Awaitable[T]) -> T:
    """Await a `DeploymentResponse`; if the caller is cancelled, so is the work on the replica."""
    try:
        return await response
    except grpc.aio.AioRpcError as error:
        raise _failure_of(error.code().name) from error
    except _REPLICA_FAILED as error:
        raise _ReplicaFailed from error
    except RuntimeError as error:
        if found := _UNEXPECTED.match(str(error)):
            raise _failure_of(found[1]) from error
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            response.cancel()  # type: ignore[attr-defined]
            raise
        raise _ReplicaFailed from error  # Serve cancelled it, as it does when a replica shuts down


def _failure_of(status_code: str) -> Exception:
    return _MessageRefused() if status_code == "RESOURCE_EXHAUSTED" else _ReplicaFailed()


def _joined(pages: list[AdapterPage], limit: int | None) -> AdapterPage:
    """One row for each adapter; it is resident if some replica holds it."""
    joined: dict[str, AdapterRow] = {}
    for row in (row for page in pages for row in page.rows):
        known = joined.get(row.id)
        if known is None or (row.resident and not known.resident):
            joined[row.id] = row
    rows = sorted(joined.values())[:limit]
    has_more = len(rows) < len(joined) or any(page.has_more for page in pages)
    return AdapterPage(rows, max(page.total for page in pages), has_more, pages[0].clicks)


def _replica_failed() -> ServeError:
    return ServeError("replica_failed", "the replica died while it worked on the request: try again", RETRY_AFTER_S)


def _not_ready() -> ServeError:
    return ServeError("not_ready", "no replica is ready yet: try again in a few seconds", RETRY_AFTER_S)
