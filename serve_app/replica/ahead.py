"""Work on waiting requests in a second thread, while the model thread runs a batch of others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic

from serve_app.replica.model_thread import ModelThread
from serve_app.replica.waiting import Item, Waiting

logger = logging.getLogger(__name__)


class Ahead(Generic[Item]):
    """Does the first part of the work on the items at the front of a queue. Belongs to the queue's event loop.

    An item whose work fails here stays as it is: its batch does the work, and meets the error.

    Args:
        is_needed: Whether there is such work on an item; called on the event loop.
        prepare: Does it in the second thread, and returns the items, prepared, in the same order.
        most: Items of one call. As many may wait prepared before it pauses, which bounds their memory.
    """

    def __init__(
        self, is_needed: Callable[[Item], bool], prepare: Callable[[list[Item]], Sequence[Item]], *, most: int
    ) -> None:
        self.is_needed = is_needed
        self._prepare = prepare
        self._most = most
        self._thread = ModelThread("ahead")
        self._in_hand: list[Waiting[Item, Any]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the work in hand has taken; 0 when there is none."""
        return self._thread.busy_s

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The work in hand; None if there is none."""
        return self._task

    def begin(self, queue: Sequence[Waiting[Item, Any]], changed: Callable[[], None]) -> None:
        """Take the first items of the queue in hand, if the thread is free; `changed` is called when they are done."""
        if self._task is not None or sum(waiting.is_prepared for waiting in queue) >= self._most:
            return
        self._in_hand = [waiting for waiting in queue if waiting.needs_work and not waiting.future.done()][: self._most]
        if self._in_hand:
            self._task = asyncio.create_task(self._work(self._in_hand, changed))

    def choose(self, queue: Sequence[Waiting[Item, Any]]) -> list[Waiting[Item, Any]]:
        """Which of the queue the model thread may take now, in order.

        Items whose work is done or not needed go first: the others wait for this thread. Where it has nothing in hand,
        the model thread takes half of the others and does all of their work itself.
        """
        ready = [waiting for waiting in queue if not waiting.needs_work]
        if ready or self._in_hand:
            return ready
        return list(queue)[: min(self._most, -(-len(queue) // 2))]

    def stop(self) -> None:
        """Let the thread end after its current work."""
        self._thread.stop()

    async def _work(self, in_hand: Sequence[Waiting[Item, Any]], changed: Callable[[], None]) -> None:
        try:
            items = [waiting.item for waiting in in_hand]
            prepared = await self._thread.run(lambda: self._prepare(items))
            for waiting, item in zip(in_hand, prepared, strict=True):
                waiting.item, waiting.is_prepared = item, True
        except Exception as error:
            logger.warning("work ahead of a batch failed with %s: the batch does it", type(error).__name__)
        finally:
            for waiting in in_hand:
                waiting.needs_work = False
            self._in_hand, self._task = [], None
            changed()
