"""Request batching without timers: requests that arrive while the model is busy share its next forward pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic

from sam3lora.engine.device import is_out_of_memory
from sam3lora.engine.halving import run_in_halves
from serve_app.http.errors import ServeError
from serve_app.metrics import ReplicaMetrics
from serve_app.replica.ahead import Ahead
from serve_app.replica.model_thread import ModelThread
from serve_app.replica.waiting import Item, Job, Outcome, Result, Waiting, too_late

logger = logging.getLogger(__name__)

_NEWEST = 0.2  # weight of the newest batch in the running mean of seconds per item


class Batcher(Generic[Item, Result]):
    """A queue in front of the model thread. Belongs to one event loop.

    Args:
        run: Computes a batch in the model thread and returns a result or an exception for each item. If it raises, all
            items get the exception; if it runs out of memory, the batch is tried again in halves. It must raise a
            device error, after which nothing runs any more.
        max_rows: Most rows of a batch; a larger item is a batch of its own.
        max_queued: Items that may wait.
        overload_type: Type of the `ServeError` for an item beyond that.
        free_memory: Called in the model thread before a further attempt after memory ran out.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        max_rows: int,
        max_queued: int,
        overload_type: str = "overloaded",
        free_memory: Callable[[], None] = lambda: None,
        metrics: ReplicaMetrics | None = None,
    ) -> None:
        self._run = run
        self._max_rows = max_rows
        self._max_queued = max_queued
        self._overload_type = overload_type
        self._free_memory = free_memory
        self._metrics = metrics
        self._ahead: Ahead[Item] | None = None
        self._thread = ModelThread()
        self._waiting: deque[Waiting[Item, Result]] = deque()
        self._jobs: deque[Job] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._closed = False
        self._paused = False
        self._runs_batch = False
        self._seconds_per_item = 0.0

    def work_ahead(self, ahead: Ahead[Item]) -> None:
        """Have waiting items worked on while a batch runs; before anything is submitted."""
        self._ahead = ahead

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """Seconds that the current work with the model has taken; 0 when it is idle."""
        return max(self._thread.busy_s, self._ahead.busy_s if self._ahead else 0.0)

    @property
    def device_error(self) -> Exception | None:
        """The error that made the device unusable for this process, such as a failed CUDA kernel."""
        return self._thread.device_error

    def pause(self) -> None:
        """Start no batch until `resume`; other work in the model thread continues."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self._waiting:
            self._start_draining()

    def check_room(self, coming: int = 0) -> None:
        """Check that one more item may wait while `coming` others are being prepared.

        Raises:
            ServeError: The queue is full or closed, or the device failed.
        """
        self._check_alive()
        waiting = len(self._waiting) + coming
        if waiting >= self._max_queued:
            raise ServeError(
                self._overload_type,
                f"{waiting} requests wait for the model, the most allowed: try again later",
                self._retry_after_s(waiting),
            )

    async def submit(self, item: Item, *, rows: int, timeout_s: float) -> Outcome[Result]:
        """Queue an item and wait for its result; an item whose caller is cancelled is not computed.

        Raises:
            ServeError: The queue is full or closed, the time is up, the device failed, or memory ran out for this item
                alone.
            Exception: The one that `run` returned for the item.
        """
        self.check_room()
        future: asyncio.Future[Outcome[Result]] = asyncio.get_running_loop().create_future()
        waiting: Waiting[Item, Result] = Waiting(item, rows, time.monotonic() + timeout_s, future)
        waiting.needs_work = self._ahead is not None and self._ahead.is_needed(item)
        self._waiting.append(waiting)
        self._start_draining()
        self._look_ahead()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await waiting.future
        except TimeoutError:
            if not limit.expired():
                raise
            raise too_late() from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def run_in_model_thread(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` between two batches, before the waiting ones; once more if memory runs out."""
        self._check_alive(closing=not self._working())
        job = Job(fn, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._start_draining()
        return await job.future

    def run_at_start(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` in the model thread and block until it is done; before anything is submitted."""
        return self._thread.run_at_start(fn)

    async def close(self) -> None:
        """Refuse new items and finish the waiting ones."""
        self._closed = True
        self.resume()
        while working := self._working():
            await asyncio.wait(working)
        self.stop()

    def stop(self) -> None:
        """Let the model thread end after its current work."""
        self._closed = True
        self._thread.stop()
        if self._ahead is not None:
            self._ahead.stop()

    def _working(self) -> list[asyncio.Task[None]]:
        tasks = (self._draining, self._ahead.task if self._ahead else None)
        return [task for task in tasks if task is not None]

    def _check_alive(self, closing: bool = True) -> None:
        if self.device_error is not None:
            raise ServeError("replica_failed", "the device of this replica failed: send the request again", 2.0)
        if self._closed and closing:
            raise ServeError("not_ready", "this replica is shutting down: send the request again", 1.0)

    def _retry_after_s(self, waiting: int) -> float:
        return max(1.0, waiting * self._seconds_per_item)

    def _start_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    def _look_ahead(self) -> None:
        if self._ahead is not None and self._runs_batch:
            self._ahead.begin(self._waiting, self._ahead_changed)

    def _ahead_changed(self) -> None:
        if self._waiting:
            self._start_draining()
        self._look_ahead()

    async def _drain(self) -> None:
        """Run until nothing waits. It is the only task that uses the model thread, so nothing runs beside a batch."""
        try:
            while self._jobs or self._choices():
                if self._jobs:
                    await self._do(self._jobs.popleft())
                elif batch := self._next_batch():
                    self._runs_batch = True
                    self._look_ahead()
                    await self._compute(batch)
                    self._runs_batch = False
                    # Let the callers of this batch run before the next one starts: one whose masks take too much memory
                    # calls `pause`, and has to do so in time.
                    await asyncio.sleep(0)
        finally:
            self._draining, self._runs_batch = None, False

    async def _do(self, job: Job) -> None:
        if job.future.cancelled():
            return
        try:
            result = await self._thread.run(lambda: self._run_or_free(job.run))
        except Exception as error:
            if not job.future.done():
                job.future.set_exception(error)
        else:
            if not job.future.done():
                job.future.set_result(result)

    def _choices(self) -> list[Waiting[Item, Result]]:
        """What a batch may take now, in order. Without items that are worked on ahead: `_ahead_changed` follows."""
        if self._paused:
            return []
        return list(self._waiting) if self._ahead is None else self._ahead.choose(self._waiting)

    def _next_batch(self) -> list[Waiting[Item, Result]]:
        """As many items from the front of the queue as fit, in order."""
        batch: list[Waiting[Item, Result]] = []
        rows = 0
        for waiting in self._choices():
            if batch and rows + waiting.rows > self._max_rows:
                break
            self._waiting.remove(waiting)
            if waiting.future.done():  # its caller left
                continue
            if waiting.deadline <= time.monotonic():
                waiting.future.set_exception(too_late())
                continue
            batch.append(waiting)
            rows += waiting.rows
        return batch

    async def _compute(self, batch: list[Waiting[Item, Result]]) -> None:
        started = time.monotonic()
        waited_s = [started - waiting.since for waiting in batch]
        if self._metrics is not None:
            self._metrics.batch_rows.observe(sum(waiting.rows for waiting in batch))
            self._metrics.batch_requests.observe(len(batch))
        results: Sequence[Result | Exception]
        try:
            results = await self._thread.run(lambda: self._run_or_halve([waiting.item for waiting in batch]))
        except Exception as error:
            results = [error] * len(batch)
        ran_s = time.monotonic() - started
        # A running mean predicts how long the queue takes: it becomes `Retry-After`. The first batch sets it.
        per_item = ran_s / len(batch)
        self._seconds_per_item += (per_item - self._seconds_per_item) * (_NEWEST if self._seconds_per_item else 1.0)
        if self._metrics is not None:
            self._metrics.batch_seconds.observe(ran_s)
        for waiting, result, seconds in zip(batch, results, waited_s, strict=True):
            if waiting.future.done():  # its caller left while the batch ran
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(Outcome(result, seconds, ran_s))

    def _run_or_free(self, fn: Callable[[], Any]) -> Any:
        """In the model thread. One further attempt, with all free memory, if memory runs out."""
        try:
            return fn()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._free("work between batches")
        return fn()

    def _free(self, work: str) -> None:
        if self._metrics is not None:
            self._metrics.out_of_memory.inc()
        logger.warning("out of memory during %s: caches are emptied", work)
        self._free_memory()

    def _run_or_halve(self, items: list[Item]) -> Sequence[Result | Exception]:
        """In the model thread. Halves a batch that runs out of memory; a single item gets one further attempt."""
        results = run_in_halves(self._attempt, items, lambda num: self._free(f"a batch of {num} requests"))
        message = "memory ran out for this request alone: ask with fewer prompts or lower max_detections"
        retry_after_s = self._retry_after_s(len(self._waiting))
        return [ServeError("out_of_memory", message, retry_after_s) if result is None else result for result in results]

    def _attempt(self, items: list[Item]) -> Sequence[Result | Exception] | None:
        """The results, or None if memory ran out."""
        if self.device_error is not None:
            return [self.device_error] * len(items)
        try:
            results = self._run(items)
            if len(results) != len(items):
                raise RuntimeError(f"expected {len(items)} results of a batch, got {len(results)}")
            return results
        except Exception as error:
            if is_out_of_memory(error):
                return None
            self._thread.note(error)
            return [error] * len(items)
