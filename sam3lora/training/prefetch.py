"""`prefetch`: prepares the next items of an iterator on a thread while the caller uses the current one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Source = TypeVar("Source")
Item = TypeVar("Item")

_STOP_S = 30.0  # longest wait for the item in preparation when the iterator is closed
_END = object()


def prefetch(source: Iterable[Source], prepare: Callable[[Source], Item], *, ahead: int = 2) -> Iterator[Item]:
    """``prepare(item)`` of each item of the source, in its order; at most ``ahead`` are prepared and not yet used.

    The thread starts with the first ``next``. An error of the source or of ``prepare`` is raised in place of the item,
    after all items before it. Closing or dropping the iterator stops the thread, which closes the source if it has a
    ``close`` method.

    Raises:
        ValueError: ``ahead`` is not positive.
    """
    if ahead < 1:
        raise ValueError(f"ahead must be positive, got {ahead}")
    return _prefetched(source, prepare, ahead)


def _prefetched(source: Iterable[Source], prepare: Callable[[Source], Item], ahead: int) -> Iterator[Item]:
    made: SimpleQueue = SimpleQueue()
    room = threading.Semaphore(ahead)
    stopped = threading.Event()
    thread = threading.Thread(
        target=_make, args=(source, prepare, made, room, stopped), name="sam3lora-prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        if thread is not threading.current_thread():  # the garbage collector may close this on any thread
            thread.join(_STOP_S)


def _make(
    source: Iterable[Source],
    prepare: Callable[[Source], Item],
    made: SimpleQueue,
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    try:
        items = iter(source)
        try:
            while room.acquire() and not stopped.is_set():
                try:
                    item = next(items)
                except StopIteration:
                    break
                made.put((prepare(item), None))
                del item  # it may be large, and the wait for room may be long
        finally:
            if (close := getattr(items, "close", None)) is not None:
                close()
        made.put((_END, None))
    except BaseException as error:  # the caller waits for an item and must get any error
        made.put((None, error))
