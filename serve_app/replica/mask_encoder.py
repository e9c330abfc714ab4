"""Encoding of the model's masks at the size of the image, in threads, limited in time and memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sam3lora.engine.detect import Kept
from sam3lora.engine.detections import Instances
from sam3lora.engine.engine import Answer
from serve_app.http.errors import ServeError

MAX_WAITING_BYTES = 2**30
"""Mask logits that may wait here before the model pauses; one batch more may arrive while it pauses."""


class MaskEncoder:
    """Encodes masks for one event loop.

    Args:
        finish: `MixedBatchSegmenter.finish`: encodes one mask after the other.
        threads: Answers that are encoded at a time; others wait in order of arrival.
        pause: Called when waiting answers hold too much memory.
        resume: Called when they hold less again.
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

    async def encode(self, answer: Answer, deadline: float, *, masks: bool = True) -> list[Instances]:
        """The detections of each prompt. Stops between two masks when the time is up or the caller is cancelled.

        Args:
            answer: The model's answer.
            deadline: By `time.monotonic`.
            masks: False drops the masks that only suppression or merging needed.

        Raises:
            ServeError: The time is up.
        """

        def finished(work: asyncio.Future[list[Instances]]) -> None:
            work.cancelled() or work.exception()  # or asyncio would log an exception that nobody retrieved
            self._let_go(num_bytes)

        stop = threading.Event()
        work: asyncio.Future[list[Instances]] | None = None
        num_bytes = _num_bytes(answer)
        self._hold(num_bytes)
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit, self._turns:
                work = asyncio.get_running_loop().run_in_executor(self._pool, self._encode, answer, masks, stop)
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
            else:  # the thread still encodes a mask: its memory is free only after that
                work.add_done_callback(finished)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, answer: Answer, masks: bool, stop: threading.Event) -> list[Instances]:
        """In a thread: one detection at a time, so that it can stop between two masks."""
        results = []
        for prompt, kept in zip(answer.prompts, answer.kept, strict=True):

            def finish(rows: slice, prompt: str = prompt, kept: Kept = kept) -> Instances:
                return self._finish(replace(answer, prompts=(prompt,), kept=[_rows(kept, rows, masks)]))[0]

            result, found = finish(slice(0)), []
            for row in range(len(kept.scores_N)):
                if stop.is_set():
                    raise _StoppedError
                found.append(finish(slice(row, row + 1)))
            if found:
                result.scores = np.concatenate([one.scores for one in found])
                result.boxes_xyxy = np.concatenate([one.boxes_xyxy for one in found])
                result.masks = [mask for one in found for mask in one.masks] if masks else []
            results.append(result)
        return results

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
    """The caller no longer waits for the masks."""


def _num_bytes(answer: Answer) -> int:
    return sum(kept.mask_logits_NHW.nbytes for kept in answer.kept if kept.mask_logits_NHW is not None)


def _rows(kept: Kept, rows: slice, masks: bool) -> Kept:
    """Some of the detections. Merged ones keep their masks in any case: their boxes are made from them."""
    needs_masks = kept.mask_logits_NHW is not None and (masks or bool(kept.is_merged_N[rows].any()))
    return kept._replace(
        scores_N=kept.scores_N[rows],
        boxes_cxcywh_N4=kept.boxes_cxcywh_N4[rows],
        mask_logits_NHW=kept.mask_logits_NHW[rows] if needs_masks and kept.mask_logits_NHW is not None else None,
        is_merged_N=kept.is_merged_N[rows],
    )
