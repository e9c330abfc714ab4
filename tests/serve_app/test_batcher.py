"""The batcher with a model that works when it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from serve_app.http.errors import ServeError
from serve_app.replica.batcher import Batcher

pytestmark = pytest.mark.anyio
LONG_S = 60.0


class Model:
    """Doubles numbers; keeps what it was given. Between `hold` and `let_go` batches do not finish."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.most_that_fit = 1000
        self._going = threading.Event()
        self._going.set()
        self.begun = threading.Semaphore(0)

    def hold(self) -> None:
        self._going.clear()

    def let_go(self) -> None:
        self._going.set()

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.threads.add(threading.get_ident())
        self.batches.append(list(items))
        self.begun.release()
        assert self._going.wait(LONG_S)
        if len(items) > self.most_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [ValueError(f"bad {item}") if item < 0 else 2 * item for item in items]


@asynccontextmanager
async def open_batcher(**settings: Any) -> AsyncIterator[tuple[Model, Batcher[int, int]]]:
    """A model and a batcher before it; nothing in the block may take longer than `LONG_S`."""
    model = Model()
    batcher: Batcher[int, int] = Batcher(model, **({"max_rows": 4, "max_queued": 100} | settings))
    try:
        async with asyncio.timeout(LONG_S):
            yield model, batcher
    finally:
        model.let_go()
        await batcher.close()


async def begun(model: Model) -> None:
    """The model has a batch in hand."""
    assert await asyncio.to_thread(model.begun.acquire, timeout=LONG_S)


async def ask(batcher: Batcher[int, int], item: int, *, rows: int = 1, timeout_s: float = LONG_S) -> int:
    return (await batcher.submit(item, rows=rows, timeout_s=timeout_s)).result


async def queue(
    batcher: Batcher[int, int], *items: int, rows: int = 1, timeout_s: float = LONG_S
) -> list[asyncio.Task[int]]:
    """Tasks that wait in the queue in this order."""
    tasks = []
    for item in items:
        length = batcher.queue_length
        tasks.append(asyncio.create_task(ask(batcher, item, rows=rows, timeout_s=timeout_s)))
        while batcher.queue_length == length:
            await asyncio.sleep(0)
    return tasks


async def occupy(model: Model, batcher: Batcher[int, int]) -> asyncio.Task[int]:
    """The model works on item 0 until it is let go."""
    model.hold()
    task = asyncio.create_task(ask(batcher, 0))
    await begun(model)
    return task


async def test_an_idle_model_runs_at_once_and_a_busy_one_finds_a_batch_in_order():
    async with open_batcher() as (model, batcher):
        assert await ask(batcher, 7) == 14
        first = await occupy(model, batcher)
        rest = await queue(batcher, 1, 2, 3, 4, 5, 6)
        assert batcher.queue_length == 6
        model.let_go()
        assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10, 12]
    assert model.batches == [[7], [0], [1, 2, 3, 4], [5, 6]]
    assert len(model.threads) == 1


async def test_a_batch_is_limited_by_rows_and_keeps_the_order():
    async with open_batcher() as (model, batcher):
        first = await occupy(model, batcher)
        tasks = [
            *await queue(batcher, 1, rows=3),
            *await queue(batcher, 2, rows=2),  # does not fit beside the first
            *await queue(batcher, 3, rows=1),  # would fit beside the first, but not ahead of the second
            *await queue(batcher, 4, rows=9),  # larger than a batch: alone
            *await queue(batcher, 5, rows=1),
        ]
        model.let_go()
        await asyncio.gather(first, *tasks)
    assert model.batches == [[0], [1], [2, 3], [4], [5]]


async def test_outcomes_hold_waiting_and_running_times():
    began = time.monotonic()
    async with open_batcher() as (model, batcher):
        first = await occupy(model, batcher)
        second = asyncio.create_task(batcher.submit(1, rows=1, timeout_s=LONG_S))
        while not batcher.queue_length:
            await asyncio.sleep(0)
        assert batcher.busy_s > 0
        model.let_go()
        await first
        outcome = await second
        assert outcome.waited_s > 0
        assert outcome.ran_s > 0
        assert outcome.waited_s + outcome.ran_s < time.monotonic() - began
        while batcher.busy_s:
            await asyncio.sleep(0)


async def test_items_that_nobody_waits_for_are_not_computed():
    async with open_batcher() as (model, batcher):
        with pytest.raises(ServeError, match="timeout"):  # even by an idle model
            await ask(batcher, 4, timeout_s=-1)
        first = await occupy(model, batcher)
        first.cancel()  # a caller that leaves during the batch does no harm
        kept, dropped = await queue(batcher, 1, 2)
        (late,) = await queue(batcher, 3, timeout_s=0.01)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        with pytest.raises(ServeError) as refused:
            await late
        assert refused.value.type == "timeout"
        assert batcher.queue_length == 1
        model.let_go()
        assert await kept == 2
    assert model.batches == [[0], [1]]


@pytest.mark.parametrize("type", ["overloaded", "too_many_requests"])
async def test_a_full_queue_refuses_at_once_with_retry_after(type: str):
    async with open_batcher(max_queued=2, overload_type=type) as (model, batcher):
        first = await occupy(model, batcher)
        tasks = await queue(batcher, 1, 2)
        with pytest.raises(ServeError) as refused:
            await ask(batcher, 3)
        assert refused.value.type == type
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        model.let_go()
        assert await asyncio.gather(first, *tasks) == [0, 2, 4]
        assert await ask(batcher, 4) == 8  # there is room again
    assert model.batches == [[0], [1, 2], [4]]


async def test_items_in_preparation_count_as_waiting_and_retry_after_grows_with_them():
    async with open_batcher(max_queued=2) as (_, batcher):
        outcomes = await asyncio.gather(*(batcher.submit(item, rows=1, timeout_s=LONG_S) for item in range(2)))
        batcher.check_room(coming=1)
        for coming in (2, 10**9):
            with pytest.raises(ServeError, match="overloaded") as refused:
                batcher.check_room(coming=coming)
        assert refused.value.retry_after_s == pytest.approx(10**9 * outcomes[0].ran_s / 2)


async def test_a_bad_item_fails_alone():
    async with open_batcher() as (model, batcher):
        first = await occupy(model, batcher)
        good, bad = await queue(batcher, 1, -1)
        model.let_go()
        assert await good == 2
        with pytest.raises(ValueError, match="bad -1"):
            await bad
        await first
    assert model.batches == [[0], [1, -1]]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda items: 1 / 0, ZeroDivisionError),
        (lambda items: [], RuntimeError),  # not a result for each item
    ],
)
async def test_a_batch_that_fails_as_a_whole_does_not_end_the_batcher(broken: Callable, error: type[Exception]):
    runs = [broken, lambda items: items]
    batcher: Batcher[int, int] = Batcher(lambda items: runs.pop(0)(items), max_rows=4, max_queued=4)
    failed = await asyncio.gather(ask(batcher, 1), ask(batcher, 2), return_exceptions=True)
    assert [type(found) for found in failed] == [error, error]
    assert await ask(batcher, 3) == 3
    await batcher.close()


async def test_out_of_memory_halves_the_batch_until_it_fits():
    freed: list[int] = []

    def free() -> None:
        freed.append(1)
        if model.most_that_fit == 0:
            model.most_that_fit = 1

    async with open_batcher(free_memory=free) as (model, batcher):
        model.most_that_fit = 1
        first = await occupy(model, batcher)
        tasks = await queue(batcher, 1, 2, 3, 4)
        model.let_go()
        assert await asyncio.gather(first, *tasks) == [0, 2, 4, 6, 8]
        assert len(freed) == 3  # before each of the smaller attempts
        model.most_that_fit = 0
        assert await ask(batcher, 5) == 10  # a single item gets a second attempt
    assert model.batches == [[0], [1, 2, 3, 4], [1, 2], [1], [2], [3, 4], [3], [4], [5], [5]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_item_that_never_fits_is_refused_and_the_others_are_answered(error: Exception):
    def run(items: list[int]) -> list[int]:
        if 7 in items:
            raise error
        return items

    batcher: Batcher[int, int] = Batcher(run, max_rows=4, max_queued=4)
    asked = [asyncio.create_task(ask(batcher, item)) for item in (6, 7, 8)]
    good, bad, other = await asyncio.gather(*asked, return_exceptions=True)
    assert (good, other) == (6, 8)
    assert isinstance(bad, ServeError)
    assert bad.type == "out_of_memory"
    assert bad.retry_after_s is not None
    await batcher.close()


async def test_other_work_in_the_model_thread_runs_before_waiting_batches():
    order: list[str] = []
    async with open_batcher() as (model, batcher):
        first = await occupy(model, batcher)
        tasks = await queue(batcher, 1)
        placed = asyncio.create_task(
            batcher.run_in_model_thread(lambda: order.append(f"after {len(model.batches)}") or threading.get_ident())
        )
        await asyncio.sleep(0)
        assert not order
        model.let_go()
        assert await placed in model.threads
        await asyncio.gather(first, *tasks)
    assert model.batches == [[0], [1]]
    assert order == ["after 1"]


async def test_other_work_that_fails_raises_to_its_caller_and_out_of_memory_gets_a_second_attempt():
    happened: list[str] = []
    freed: list[int] = []

    def free() -> None:
        happened.append("free")
        freed.append(threading.get_ident())

    def work(fails: int) -> int:
        happened.append("work")
        if happened.count("work") <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return threading.get_ident()

    async with open_batcher(free_memory=free) as (_, batcher):
        with pytest.raises(ZeroDivisionError):
            await batcher.run_in_model_thread(lambda: 1 / 0)
        assert happened == []
        assert await batcher.run_in_model_thread(lambda: work(1)) == freed[0]
        assert happened == ["work", "free", "work"]
        with pytest.raises(torch.OutOfMemoryError):
            await batcher.run_in_model_thread(lambda: work(100))
        assert happened == ["work", "free", "work"] * 2
        assert await ask(batcher, 1) == 2


async def test_a_paused_batcher_starts_no_batch_until_it_resumes():
    async with open_batcher() as (model, batcher):
        batcher.pause()
        tasks = await queue(batcher, 1, 2)
        (late,) = await queue(batcher, 3, timeout_s=0.01)
        with pytest.raises(ServeError, match="timeout"):
            await late
        assert await batcher.run_in_model_thread(lambda: "work") == "work"
        assert model.batches == []
        batcher.resume()
        assert await asyncio.gather(*tasks) == [2, 4]
    assert model.batches == [[1, 2]]


async def test_closing_finishes_waiting_items_and_refuses_new_ones():
    async with open_batcher() as (model, batcher):
        first = await occupy(model, batcher)
        tasks = await queue(batcher, 1, 2)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="not_ready"):
            await ask(batcher, 3)
        assert not closing.done()
        model.let_go()
        assert await asyncio.gather(first, *tasks) == [0, 2, 4]
        await closing
        with pytest.raises(ServeError, match="not_ready"):
            await batcher.run_in_model_thread(lambda: 1)
    assert model.batches == [[0], [1, 2]]


DEVICE_ERROR = torch.AcceleratorError("CUDA error: device-side assert triggered")


def fail(*args: Any) -> Any:
    raise DEVICE_ERROR


async def test_a_device_that_fails_in_a_batch_runs_nothing_more():
    batches: list[list[int]] = []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise DEVICE_ERROR

    batcher: Batcher[int, int] = Batcher(run, max_rows=4, max_queued=9)
    assert batcher.device_error is None
    failed = await asyncio.gather(*(ask(batcher, item) for item in range(6)), return_exceptions=True)
    assert failed == [DEVICE_ERROR] * 6
    assert batcher.device_error is DEVICE_ERROR
    for late in (ask(batcher, 1), batcher.run_in_model_thread(lambda: 1)):
        with pytest.raises(ServeError, match="replica_failed"):
            await late
    await batcher.close()
    assert batches == [[0, 1, 2, 3], [0, 1]]


async def test_a_device_that_fails_elsewhere_in_the_model_thread_is_remembered():
    async with open_batcher() as (_, batcher):
        with pytest.raises(torch.AcceleratorError):
            await batcher.run_in_model_thread(fail)
        assert batcher.device_error is DEVICE_ERROR
    async with open_batcher(free_memory=fail) as (model, batcher):
        model.most_that_fit = 0
        with pytest.raises(torch.AcceleratorError):
            await ask(batcher, 1)
        assert batcher.device_error is DEVICE_ERROR
