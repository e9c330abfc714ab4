"""The retry protocol of a call, without I/O: what to send, when to wait, when to give up.

`exchange` is a generator that both clients drive: it yields an `Attempt` and is sent its `Outcome`, or yields a `Wait`.
"""

from __future__ import annotations

import json
import math
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2 as httpx

from sam3lora.client.errors import (
    ConnectionFailed,
    Overloaded,
    SegmentationError,
    ServerError,
    Timeout,
    class_of_status,
)

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 4.0
MAX_RETRIES_OF_STRANGERS = 3
CAUSED_BY_REQUESTS = frozenset(("replica_failed", "out_of_memory"))
MAX_RETRIES_OF_FAILURES = 3
"""Of errors that the request itself may cause each time."""


T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """`body` holds arguments of `httpx.Client.request`: `json`, or `files` and `data`."""

    method: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Reply:
    """An HTTP response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    content: bytes = field(repr=False)

    def json(self) -> dict[str, Any]:
        """The JSON object in the content; a ValueError if there is none."""
        value = json.loads(self.content)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value


@dataclass(frozen=True)
class Attempt:
    """Send `call` and finish within `timeout_s`."""

    call: Call
    headers: Mapping[str, str]
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    seconds: float


Outcome = Reply | httpx.RequestError
Steps = Generator[Attempt | Wait, Outcome | None, T]


@dataclass
class Service:
    """What the calls of one client know together: whether anything ever responded at the URL."""

    has_responded: bool = False


class Budget:
    """Time and retries that are left for one call of the user.

    `max_retries` of None: as many as the time allows; but only `MAX_RETRIES_OF_STRANGERS` where nothing ever responded,
    as the URL may be wrong.
    """

    def __init__(
        self,
        timeout_s: float,
        max_retries: int | None,
        clock: Callable[[], float] = time.monotonic,
        service: Service | None = None,
    ) -> None:
        self.request_id = uuid.uuid4().hex
        self.service = service or Service()
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._num_retries = 0
        self._num_failures = 0
        self._clock = clock
        self._deadline = clock() + timeout_s

    @property
    def remaining_s(self) -> float:
        return self._deadline - self._clock()

    def next_wait_s(self, error: SegmentationError) -> float | None:
        """Seconds before the next attempt; None to give up."""
        if not isinstance(error, (Overloaded, ConnectionFailed)) or self._num_retries >= self._most_retries():
            return None
        if error.type in CAUSED_BY_REQUESTS:
            if self._num_failures >= MAX_RETRIES_OF_FAILURES:
                return None
            self._num_failures += 1
        longest_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._num_retries, 10))
        wait_s = max(longest_s * random.uniform(0.5, 1.0), (error.retry_after_s or 0.0) * random.uniform(1.0, 1.1))
        if wait_s >= self.remaining_s:
            return None
        self._num_retries += 1
        return wait_s

    def _most_retries(self) -> float:
        if self._max_retries is not None:
            return self._max_retries
        return math.inf if self.service.has_responded else MAX_RETRIES_OF_STRANGERS

    def out_of_time(self) -> Timeout:
        message = f"no response within {self._timeout_s:g} s: use a longer timeout_s, or check the load of the service"
        return Timeout("timeout", message, request_id=self.request_id)


def exchange(call: Call, budget: Budget) -> Steps[Reply]:
    """Send until there is a response, a failure that a retry cannot help, or an empty budget.

    Retries follow 502, 503 and 429 (after `Retry-After`) and broken connections (after a growing, random time). They
    are safe: calls change nothing but caches.

    Raises:
        SegmentationError: One of its subclasses, that of the last attempt.
    """
    headers = {"X-Request-ID": budget.request_id}
    error: SegmentationError | None = None
    while True:
        if budget.remaining_s <= 0:
            raise error or budget.out_of_time()
        outcome = yield Attempt(call, headers, budget.remaining_s)
        if isinstance(outcome, Reply):
            budget.service.has_responded = True
            if 200 <= outcome.status < 300:
                return outcome
            error = _error_of_reply(outcome, budget.request_id)
        elif isinstance(outcome, httpx.TimeoutException):
            raise budget.out_of_time()
        else:
            message = f"cannot reach the service: {outcome or type(outcome).__name__}"
            error = ConnectionFailed("connection_failed", message, request_id=budget.request_id)
        wait_s = budget.next_wait_s(error)
        if wait_s is None:
            raise error
        yield Wait(wait_s)


def read_answer(reply: Reply, parse: Callable[[dict[str, Any]], T], request_id: str) -> T:
    """Parse the JSON of a reply; a ServerError if it has another form than the service's."""
    try:
        return parse(reply.json())
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"expected the service's JSON, got {len(reply.content)} bytes of something else: is the URL right?"
        raise ServerError("unexpected_answer", message, status=reply.status, request_id=request_id) from None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The header `Retry-After`, seconds or a date (against the header `Date`, if there is one); None if unusable."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value).timestamp()
        now = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
    except (TypeError, ValueError):
        return None
    return max(0.0, until - now)


def _error_of_reply(reply: Reply, request_id: str) -> SegmentationError:
    kind, message = f"http_{reply.status}", f"the service or a proxy before it answered with HTTP {reply.status}"
    field = None
    try:
        error = reply.json()["error"]
        kind, message, request_id = str(error["type"]), str(error["message"]), str(error["request_id"])
        field = error.get("field")
    except (ValueError, KeyError, TypeError):
        pass  # not from the service itself
    wait_s = retry_after_s(reply.headers)
    return class_of_status(reply.status)(
        kind, message, status=reply.status, request_id=request_id, retry_after_s=wait_s, field=field
    )
