"""Sharing of work in threads: several requests for the same result wait for one computation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Call(Generic[T]):
    future: asyncio.Future[T]
    waiters: int = 0


class SharedCalls(Generic[T]):
    """Runs work once for all concurrent callers of a key, in the threads of a pool. Belongs to one event loop."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._calls: dict[str, _Call[T]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, or of the work in progress under the same key.

        Work that is not begun is dropped when its last caller leaves.
        """
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = _Call(asyncio.get_running_loop().run_in_executor(self._pool, work))
        call.waiters += 1
        try:
            return await asyncio.shield(call.future)
        finally:
            call.waiters -= 1
            if call.future.done() or not call.waiters:
                call.future.cancel()
                if self._calls.get(key) is call:
                    del self._calls[key]
