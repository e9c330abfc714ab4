"""Work in threads that several requests want at the same time is done once."""

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
    """Belongs to one event loop.

    Args:
        pool: Where the work is done.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._calls: dict[str, _Call[T]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, or of the work under this key that is under way.

        Work that nobody waits for any more is not begun.
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
