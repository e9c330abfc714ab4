"""A load generator for HTTP servers: requests one after the other, in a closed loop, or in an open loop.

The generator has a process of its own (`LoadGenerator`), so that its work does not delay the reports of the caller.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
import numpy as np

CLIENT_TIMEOUT_S = 120.0
NO_ANSWER = 0
"""Stands for the status where the connection failed or nothing came in time."""


@dataclass(frozen=True)
class LoadRequest:
    """A POST of `body` to `path`, the query included."""

    path: str
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class LoadSample:
    """Latency and status of a request; `reply` is kept only on demand."""

    latency_s: float
    status: int
    reply: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True)
class LoadResult:
    """Requests that ended within a window of `seconds`."""

    samples: Sequence[LoadSample]
    seconds: float

    @property
    def per_second(self) -> float:
        """Answered requests a second."""
        return sum(sample.ok for sample in self.samples) / self.seconds

    @property
    def num_errors(self) -> int:
        return sum(not sample.ok for sample in self.samples)

    def num_of(self, status: int) -> int:
        return sum(sample.status == status for sample in self.samples)

    def latency_ms(self, percentile: float, status: int = 200) -> float | None:
        """Percentile in [0, 100] of the latencies of one status; None if there was none."""
        found = [sample.latency_s for sample in self.samples if sample.status == status]
        return float(np.percentile(found, percentile)) * 1000 if found else None


class LoadGenerator:
    """Generates load in a process of its own; see the functions of the same names."""

    def __enter__(self) -> Self:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, url: str, requests: Sequence[LoadRequest], *, keep_replies: bool = False) -> LoadResult:
        return self._pool.submit(_run, in_order, url, requests, keep_replies=keep_replies).result()

    def closed_loop(
        self,
        url: str,
        requests: Sequence[LoadRequest],
        *,
        clients: int,
        seconds: float,
        warm_up_s: float = 0.0,
        all_different: bool = False,
    ) -> LoadResult:
        return self._pool.submit(
            _run,
            closed_loop,
            url,
            requests,
            clients=clients,
            seconds=seconds,
            warm_up_s=warm_up_s,
            all_different=all_different,
        ).result()

    def open_loop(
        self, url: str, requests: Sequence[LoadRequest], *, per_second: float, seconds: float, seed: int = 0
    ) -> LoadResult:
        return self._pool.submit(
            _run, open_loop, url, requests, per_second=per_second, seconds=seconds, seed=seed
        ).result()


Send = Callable[[LoadRequest], Awaitable[LoadSample]]


async def in_order(url: str, requests: Sequence[LoadRequest], *, keep_replies: bool = False) -> LoadResult:
    """Each request once, when the one before it is answered."""
    async with _session() as session:
        send = _sender(session, url, keep_replies=keep_replies)
        start = time.perf_counter()
        samples = [await send(request) for request in requests]
        return LoadResult(samples, time.perf_counter() - start)


async def closed_loop(
    url: str,
    requests: Sequence[LoadRequest],
    *,
    clients: int,
    seconds: float,
    warm_up_s: float = 0.0,
    all_different: bool = False,
) -> LoadResult:
    """Clients that send the next request as soon as the last one is answered.

    Args:
        url: Of the server, without a path.
        requests: Taken in turns by all clients, again and again.
        clients: How many.
        seconds: Requests that end within this time count,
        warm_up_s: which begins after this one.
        all_different: Give the JPEG of every request bytes that were never sent before.
    """
    samples: list[LoadSample] = []
    queue = _endless(requests, all_different)
    async with _session() as session:
        send = _sender(session, url)
        begin = time.perf_counter() + warm_up_s
        end = begin + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                sample = await send(next(queue))
                if begin <= time.perf_counter() < end:
                    samples.append(sample)

        await asyncio.gather(*(client() for _ in range(clients)))
    return LoadResult(samples, seconds)


async def open_loop(
    url: str, requests: Sequence[LoadRequest], *, per_second: float, seconds: float, seed: int = 0
) -> LoadResult:
    """Poisson arrivals that do not wait for answers; latencies count from the moment a request was due."""
    random_numbers = random.Random(seed)
    queue = _endless(requests, all_different=False)
    tasks = []
    async with _session() as session:
        send = _sender(session, url)
        start = time.perf_counter()
        due = start + random_numbers.expovariate(per_second)
        while due < start + seconds:
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(_send_late(send, next(queue), due)))
            due += random_numbers.expovariate(per_second)
        samples = await asyncio.gather(*tasks)
        return LoadResult(samples, time.perf_counter() - start)


def with_new_bytes(jpeg: bytes) -> bytes:
    """The same picture as another file: a comment of random bytes after the start marker."""
    return jpeg[:2] + b"\xff\xfe\x00\x12" + os.urandom(16) + jpeg[2:]


def _run(ask: Callable[..., Awaitable[LoadResult]], *arguments: object, **options: object) -> LoadResult:
    async def run() -> LoadResult:
        return await ask(*arguments, **options)

    return asyncio.run(run())


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S)
    )


def _endless(requests: Sequence[LoadRequest], all_different: bool) -> Iterator[LoadRequest]:
    for request in itertools.cycle(requests):
        yield LoadRequest(request.path, with_new_bytes(request.body)) if all_different else request


def _sender(session: aiohttp.ClientSession, url: str, *, keep_replies: bool = False) -> Send:
    async def send(request: LoadRequest) -> LoadSample:
        start = time.perf_counter()
        try:
            async with session.post(
                url + request.path, data=request.body, headers={"Content-Type": "image/jpeg"}
            ) as response:
                reply = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError):
            reply, status = b"", NO_ANSWER
        return LoadSample(time.perf_counter() - start, status, reply if keep_replies else b"")

    return send


async def _send_late(send: Send, request: LoadRequest, due: float) -> LoadSample:
    """Latency with the time that the generator itself was late."""
    late = time.perf_counter() - due
    sample = await send(request)
    return LoadSample(sample.latency_s + late, sample.status)
