"""Encoding of the model's masks and labels at the size of the image, in threads, limited in time and memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

from sam3lora.engine.detections import Detections
from sam3lora.engine.selection import SmallDetections
from serve_app.http.errors import ServeError

T = TypeVar("T")

MAX_WAITING_BYTES = 2**30
"""Mask logits that may wait here before the model pauses; one batch more may arrive while it pauses."""


class MaskEncoder:
    """Encodes masks for one event loop.

    Masks of as many requests as there are threads are encoded at a time; others wait in order of arrival. `pause` is
    called when the waiting masks hold too much memory, `resume` when they hold less again.
    """

    def __init__(
        self,
        threads: int,
        *,
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        self._pause = pause
        self._resume = resume
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._turns = asyncio.Semaphore(threads)
        self._large = asyncio.Semaphore(1)
        self._bytes = 0
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Requests whose masks wait or are being encoded."""
        return self._num_waiting

    async def encode(self, found: Sequence[SmallDetections], deadline: float) -> list[Detections]:
        """The detections of each prompt. Stops between two masks when the time is up or the caller is cancelled.

        Raises:
            ServeError: The time is up; the deadline is by `time.monotonic`.
        """

        num_bytes = _num_bytes(found)
        if not num_bytes:  # nothing to encode
            return _encode(found, threading.Event())
        late = "the masks were not encoded in time: ask for fewer detections, or for no masks"
        return await self.run(partial(_encode, found), num_bytes, deadline, late=late)

    async def run(
        self,
        work: Callable[[threading.Event], T],
        num_bytes: int,
        deadline: float,
        *,
        late: str,
        is_large: bool = False,
    ) -> T:
        """The result of `work`, which is done in a thread and ends early when its event is set.

        Args:
            num_bytes: What it holds until it is done.
            late: Message of the error when the time is up.
            is_large: Whether it needs so much more memory while it runs that only one such runs at a time.

        Raises:
            ServeError: The time is up; the deadline is by `time.monotonic`.
        """

        def finished(running: asyncio.Future[T]) -> None:
            running.cancelled() or running.exception()  # or asyncio would log an exception that nobody retrieved
            self._let_go(num_bytes)

        stop = threading.Event()
        running: asyncio.Future[T] | None = None
        alone = self._large if is_large else nullcontext()
        self._hold(num_bytes)
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit, alone, self._turns:
                running = asyncio.get_running_loop().run_in_executor(self._pool, work, stop)
                return await asyncio.shield(running)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ServeError("timeout", late, 1.0) from None
        finally:
            stop.set()
            if running is None or running.done():
                self._let_go(num_bytes)
            else:  # the thread still works: its memory is free only after that
                running.add_done_callback(finished)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _hold(self, num_bytes: int) -> None:
        self._num_waiting += 1
        self._bytes += num_bytes
        if self._bytes > MAX_WAITING_BYTES:
            self._pause()

    def _let_go(self, num_bytes: int) -> None:
        self._num_waiting -= 1
        self._bytes -= num_bytes
        if self._bytes <= MAX_WAITING_BYTES:
            self._resume()


class StoppedError(Exception):
    """The caller no longer waits for the result."""


def _encode(found: Sequence[SmallDetections], stop: threading.Event) -> list[Detections]:
    """In a thread; can stop between two masks."""
    results = []
    for small in found:
        rles: list[dict] | None = None
        if small.mask_logits_NHW is not None and small.wanted.masks:
            rles = []
            for row in range(len(small.scores_N)):
                if stop.is_set():
                    raise StoppedError
                rles.append(small.encode(row))
        results.append(small.at_full_size(rles))
    return results


def _num_bytes(found: Sequence[SmallDetections]) -> int:
    return sum(small.mask_logits_NHW.nbytes for small in found if small.mask_logits_NHW is not None)
