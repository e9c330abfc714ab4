"""Answers of the model to masks at the size of the image, in threads, with a limit to time and to memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from sam3lora.engine.detect import Kept
from sam3lora.engine.detections import Instances
from sam3lora.engine.engine import Answer
from serve_app.http.errors import ServeError

MAX_WAITING_BYTES = 2**30
"""Mask logits: the model pauses while answers with more wait here, so there is at most one batch beyond that."""


class MaskEncoder:
    """Belongs to one event loop.

    Args:
        finish: `MixedBatchSegmenter.finish`.
        threads: Answers that are encoded at a time; others wait in the order they come.
        pause: Called when answers hold too much memory.
        resume: Called when they do so no longer.
    """

    def __init__(
        self,
        finish: Callable[[Answer], list[Instances]],
        *,
        threads: int,
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        self._finish = finish
        self._pause = pause
        self._resume = resume
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._turns = asyncio.Semaphore(threads)
        self._bytes = 0
        self._num_answers = 0

    @property
    def num_answers(self) -> int:
        """Answers that wait or are being encoded."""
        return self._num_answers

    async def encode(self, answer: Answer, deadline: float) -> list[Instances]:
        """For each prompt what was found. Ends between two masks when the time is up or the caller is cancelled.

        Args:
            answer: Of the model.
            deadline: By `time.monotonic`.

        Raises:
            ServeError: The time is up.
        """

        def finished(work: asyncio.Future[list[Instances]]) -> None:
            work.cancelled() or work.exception()  # nobody else looks at it
            self._let_go(num_bytes)

        stop = threading.Event()
        work: asyncio.Future[list[Instances]] | None = None
        num_bytes = _num_bytes(answer)
        self._hold(num_bytes)
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit, self._turns:
                checked = replace(answer, kept=[_checked(kept, stop) for kept in answer.kept])
                work = asyncio.get_running_loop().run_in_executor(self._pool, self._finish, checked)
                return await asyncio.shield(work)
        except TimeoutError:
            if not limit.expired():
                raise
            message = "the masks were not encoded in time: ask for fewer detections, or for no masks"
            raise ServeError("timeout", message, 1.0) from None
        finally:
            stop.set()
            if work is None or work.done():
                self._let_go(num_bytes)
            else:  # the thread still has the mask in hand
                work.add_done_callback(finished)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _hold(self, num_bytes: int) -> None:
        self._num_answers += 1
        self._bytes += num_bytes
        if self._bytes > MAX_WAITING_BYTES:
            self._pause()

    def _let_go(self, num_bytes: int) -> None:
        self._num_answers -= 1
        self._bytes -= num_bytes
        if self._bytes <= MAX_WAITING_BYTES:
            self._resume()


class _StoppedError(Exception):
    """Nobody waits for the masks any more."""


def _num_bytes(answer: Answer) -> int:
    return sum(kept.mask_logits_NHW.nbytes for kept in answer.kept if kept.mask_logits_NHW is not None)


def _checked(kept: Kept, stop: threading.Event) -> Kept:
    """With masks that can be taken one after the other, until it is to stop."""
    if kept.mask_logits_NHW is None:
        return kept
    masks: Any = _until(stop, kept.mask_logits_NHW)
    return kept._replace(mask_logits_NHW=masks)


def _until(stop: threading.Event, logits_NHW: np.ndarray) -> Iterator[np.ndarray]:
    for logits_HW in logits_NHW:
        if stop.is_set():
            raise _StoppedError
        yield logits_HW
