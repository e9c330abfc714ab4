"""Which requests are read and worked on: places for the work, and bodies that arrive, of which the slowest give way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.types import Message

from serve_app.http.errors import ServeError
from serve_app.settings import ServeSettings

PATIENCE_S = 5.0
SLOWEST_BYTES_PER_S = 1024
"""A sender that falls behind this rate is ended, at the latest `PATIENCE_S` after its last byte."""

FAIR_BYTES_PER_S = 32 * 1024
"""When one has to go, it is the sender that is furthest behind this rate."""

SLOW_AFTER_S = 1.0
"""One that is less behind, in seconds, is told to come again: it is a burst, not a slow sender."""


class _Arrival:
    """A body that is arriving, or has arrived."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self.num_bytes = 0
        self.error: ServeError | None = None
        self._is_ended = False
        self._limit = limit
        self._clock = asyncio.get_running_loop().time
        self._began_s = self._clock()
        self._ends_s = self._began_s + PATIENCE_S
        limit.reschedule(self._ends_s)

    @property
    def bytes_behind(self) -> float:
        return FAIR_BYTES_PER_S * (self._clock() - self._began_s) - self.num_bytes

    def add(self, num_bytes: int) -> None:
        """Every byte buys time, up to `PATIENCE_S` from now."""
        self.num_bytes += num_bytes
        self._ends_s = min(self._ends_s + num_bytes / SLOWEST_BYTES_PER_S, self._clock() + PATIENCE_S)
        self._end_at(self._ends_s)

    def complete(self) -> None:
        self._end_at(None)

    def end(self, error: ServeError) -> None:
        self.error = error
        self._end_at(self._clock())
        self._is_ended = True

    def _end_at(self, when_s: float | None) -> None:
        if not self._is_ended and not self._limit.expired():
            self._limit.reschedule(when_s)


class Admission:
    """Limits the requests of one HTTP process.

    A request takes a place when its body is there, so that slow senders keep nobody from the work. If no place is free
    it is refused, before its body is read where that is known. If too many bodies are arriving, or bodies hold too much
    memory, the slowest one is ended.

    Attributes:
        places: Requests that are worked on at a time: no more than the replicas have room for.
        max_arriving: Bodies that arrive at a time.
        max_bytes: Of all bodies together, whether they arrive or are worked on.
    """

    def __init__(self, settings: ServeSettings) -> None:
        limits = settings.limits
        self.places = min(limits.max_in_flight, settings.most_in_flight)
        self.max_arriving = limits.max_in_flight
        self.max_bytes = self.places * limits.max_body_bytes
        self._overload_type = "too_many_requests" if limits.overload_status == 429 else "overloaded"
        self._arriving: set[_Arrival] = set()
        self._num_working = 0
        self._num_bytes = 0

    @property
    def num_requests(self) -> int:
        """Requests that are read or worked on."""
        return len(self._arriving) + self._num_working

    @asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[Request]:
        """The request to read the body from. It holds its place until the block ends.

        Raises:
            ServeError: There is no room for its work, or its body arrives too slowly.
        """
        self._check_room()
        has_place = False

        async def receive() -> Message:
            nonlocal has_place
            message = await request.receive()
            if message["type"] == "http.request":
                num_bytes = len(message.get("body", b""))
                self._num_bytes += num_bytes
                arrival.add(num_bytes)
                if not message.get("more_body", False):
                    self._check_room()
                    arrival.complete()
                    self._arriving.discard(arrival)
                    self._num_working += 1
                    has_place = True
                elif self._num_bytes > self.max_bytes:
                    self._make_room(arrival)
            return message

        try:
            async with asyncio.timeout(None) as limit:
                arrival = _Arrival(limit)
                self._arriving.add(arrival)
                try:
                    if len(self._arriving) > self.max_arriving:
                        self._make_room(arrival)
                    yield Request(request.scope, receive)
                finally:
                    self._arriving.discard(arrival)
                    self._num_working -= has_place
                    self._num_bytes -= arrival.num_bytes
        except TimeoutError:
            if not limit.expired():
                raise
            raise arrival.error or _slow_body() from None

    def _check_room(self) -> None:
        if self._num_working >= self.places:
            raise self._overloaded()

    def _make_room(self, newcomer: _Arrival) -> None:
        """End the slowest of the others; raises a ServeError where all of them are quick."""
        others = self._arriving - {newcomer}
        slowest = max(others, key=lambda one: one.bytes_behind, default=None)
        if slowest is None or slowest.bytes_behind <= 0:
            raise self._overloaded()
        self._arriving.discard(slowest)
        is_slow = slowest.bytes_behind > SLOW_AFTER_S * FAIR_BYTES_PER_S
        slowest.end(_slow_body() if is_slow else self._overloaded())

    def _overloaded(self) -> ServeError:
        message = "more requests are under way than the service takes: try again later"
        return ServeError(self._overload_type, message, 1.0)


def _slow_body() -> ServeError:
    return ServeError("slow_body", "the body arrives too slowly: send it faster, or a smaller image")
