"""The next items of an iterator are made on a thread while the caller uses this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Source = TypeVar("Source")
Item = TypeVar("Item")

_STOP_S = 30.0  # longest wait for an item that is being made when nobody wants it any more
_END = object()


def prefetch(source: Iterable[Source], prepare: Callable[[Source], Item], *, ahead: int = 2) -> Iterator[Item]:
    """``prepare(item)`` of each item of the source, in its order.

    The thread starts when the first item is asked for. An error of the source or of ``prepare`` is raised in place of
    the item, after all that come before it. Closing the iterator, or dropping it, stops the thread, which closes the
    source if that can be closed.

    Args:
        source: Iterated by the thread only.
        prepare: Called by the thread.
        ahead: Items made and not yet asked for, at most.

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
        if thread is not threading.current_thread():  # the garbage collector may close this anywhere
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
                del item  # it may be large, and there may be no room for the next one for long
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        made.put((_END, None))
    except BaseException as error:  # whatever it is, the caller is waiting for it
        made.put((None, error))
