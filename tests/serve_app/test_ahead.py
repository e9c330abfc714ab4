"""A batcher whose waiting items are worked on ahead, by a model and a second thread that work when they are told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.http.errors import ServeError
from serve_app.replica import engine_work
from serve_app.replica.ahead import Ahead
from serve_app.replica.batcher import Batcher
from serve_app.settings import Batching, ServeSettings

pytestmark = pytest.mark.anyio
LONG_S = 60.0


class Stage:
    """Keeps the items of each call; between `hold` and `let_go` calls do not finish."""

    def __init__(self, result: Callable[[str], str]) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self._result = result
        self._going = threading.Event()
        self._going.set()

    def hold(self) -> None:
        self._going.clear()

    def let_go(self) -> None:
        self._going.set()

    def __call__(self, items: list[str]) -> list[str]:
        self.threads.add(threading.get_ident())
        self.calls.append(list(items))
        assert self._going.wait(LONG_S)
        if self.error:
            raise self.error
        return [self._result(item) for item in items]


class Service:
    """Items are words; the second thread makes them capitals, which words in capitals do not need."""

    def __init__(self, most: int) -> None:
        self.ahead, self.model = Stage(str.upper), Stage(lambda item: f"{item}!")
        self.batcher: Batcher[str, str] = Batcher(self.model, max_rows=4, max_queued=100)
        self.batcher.work_ahead(Ahead(str.islower, self.ahead, most=most))

    async def queue(self, *items: str, timeout_s: float = LONG_S) -> list[asyncio.Task[str]]:
        """Tasks that wait in the queue in this order."""
        tasks = []
        for item in items:
            length = self.batcher.queue_length
            tasks.append(asyncio.create_task(self.ask(item, timeout_s)))
            while self.batcher.queue_length == length:
                await asyncio.sleep(0)
        return tasks

    async def ask(self, item: str, timeout_s: float = LONG_S) -> str:
        return (await self.batcher.submit(item, rows=1, timeout_s=timeout_s)).result

    async def occupy(self) -> asyncio.Task[str]:
        """The model has the item "FIRST" in hand until it is let go."""
        self.model.hold()
        task = asyncio.create_task(self.ask("FIRST"))
        await until(lambda: self.model.calls)
        return task

    async def prepared(self) -> None:
        """The second thread has nothing in hand."""
        await until(lambda: self.batcher._ahead.task is None)


@asynccontextmanager
async def serving(most: int = 4) -> AsyncIterator[Service]:
    service = Service(most)
    try:
        async with asyncio.timeout(LONG_S):
            yield service
    finally:
        service.ahead.let_go()
        service.model.let_go()
        await service.batcher.close()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("setting", "model_threads", "cores", "replicas", "expected"),
    [
        (None, 1, 2, 1, True),
        (None, 2, 4, 1, False),  # the model's own threads take the cores
        (None, 1, 2, 2, False),  # and here its other replicas
        (False, 1, 2, 1, False),
        (True, 2, 1, 1, True),
    ],
)
def test_images_are_encoded_ahead_where_cores_would_be_idle(
    monkeypatch: pytest.MonkeyPatch,
    setting: bool | None,
    model_threads: int,
    cores: int,
    replicas: int,
    expected: bool,
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: model_threads)
    monkeypatch.setattr(engine_work, "usable_cpus", lambda: cores)
    settings = ServeSettings(replicas=replicas, batching=Batching(encode_ahead=setting))
    for may in (True, False):  # as on a CPU, as on a GPU
        engine: Any = SimpleNamespace(may_encode_ahead=may)
        assert (engine_work.encoding_ahead(engine, settings) is not None) == (expected and may)


async def test_a_lone_item_goes_to_the_idle_model_as_it_is():
    async with serving() as service:
        assert await service.ask("a") == "a!"
    assert service.ahead.calls == []


async def test_waiting_items_are_prepared_while_the_model_works_on_others():
    async with serving() as service:
        first = await service.occupy()
        tasks = await service.queue("a", "b")
        await until(lambda: len(service.ahead.calls) == 2)  # "b" came while "a" was in hand
        await service.prepared()
        assert service.model.calls == [["FIRST"]]
        service.model.let_go()
        assert await asyncio.gather(first, *tasks) == ["FIRST!", "A!", "B!"]
    assert service.ahead.calls == [["a"], ["b"]]
    assert service.model.calls == [["FIRST"], ["A", "B"]]
    assert not service.ahead.threads & service.model.threads


async def test_the_model_takes_what_is_ready_and_waits_for_what_is_in_hand():
    async with serving() as service:
        first = await service.occupy()
        service.ahead.hold()
        in_hand, known = await service.queue("a", "KNOWN")
        await until(lambda: service.ahead.calls)
        service.model.let_go()
        assert await asyncio.gather(first, known) == ["FIRST!", "KNOWN!"]
        assert await service.batcher.run_in_model_thread(lambda: "work between batches") == "work between batches"
        assert not in_hand.done()
        service.ahead.let_go()
        assert await in_hand == "A!"
    assert service.model.calls == [["FIRST"], ["KNOWN"], ["A"]]


async def test_an_idle_model_shares_a_burst_with_the_second_thread():
    async with serving() as service:
        tasks = [asyncio.create_task(service.ask(item)) for item in "abcd"]
        await asyncio.gather(*tasks)
    assert service.model.calls == [["a", "b"], ["C", "D"]]
    assert service.ahead.calls == [["c", "d"]]


async def test_few_items_wait_prepared():
    async with serving(most=2) as service:
        first = await service.occupy()
        tasks = await service.queue(*"abcde")
        await until(lambda: sum(map(len, service.ahead.calls)) >= 2)
        await service.prepared()
        await asyncio.sleep(0)
        assert sum(map(len, service.ahead.calls)) == 3  # "a" by itself, then "b" and "c"
        service.model.let_go()
        assert [answer.upper() for answer in await asyncio.gather(first, *tasks)] == [
            "FIRST!",
            *(f"{item}!" for item in "ABCDE"),
        ]


async def test_work_that_fails_ahead_is_left_to_the_batch():
    async with serving() as service:
        service.ahead.error = MemoryError()
        first = await service.occupy()
        tasks = await service.queue("a", "b")
        await until(lambda: len(service.ahead.calls) == 2)
        service.model.let_go()
        assert await asyncio.gather(first, *tasks) == ["FIRST!", "a!", "b!"]
    assert service.ahead.calls == [["a"], ["b"]]  # each once


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_an_item_in_hand_that_nobody_waits_for_is_not_computed(how: str):
    async with serving() as service:
        first = await service.occupy()
        service.ahead.hold()
        (leaving,) = await service.queue("a", timeout_s=0.01 if how == "timeout" else LONG_S)
        (staying,) = await service.queue("b")
        await until(lambda: service.ahead.calls)
        if how == "cancel":
            leaving.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else ServeError):
            await leaving
        assert service.batcher.queue_length == 1
        service.ahead.let_go()
        await until(lambda: len(service.ahead.calls) == 2)
        service.model.let_go()
        assert (await asyncio.gather(first, staying))[0] == "FIRST!"
    assert [item.upper() for batch in service.model.calls for item in batch] == ["FIRST", "B"]


async def test_closing_finishes_items_in_hand():
    async with serving() as service:
        first = await service.occupy()
        service.ahead.hold()
        (task,) = await service.queue("a")
        await until(lambda: service.ahead.calls)
        service.model.let_go()
        await first
        closing = asyncio.create_task(service.batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="not_ready"):
            await service.ask("b")
        assert not closing.done()
        service.ahead.let_go()
        assert await task == "A!"
        await closing


async def test_a_second_thread_that_is_stuck_counts_as_busy():
    async with serving() as service:
        first = await service.occupy()
        service.ahead.hold()
        (task,) = await service.queue("a")
        await until(lambda: service.ahead.calls)
        service.model.let_go()
        await first
        await until(lambda: service.batcher._draining is None)
        assert service.batcher.busy_s > 0
        service.ahead.let_go()
        await task
        await until(lambda: not service.batcher.busy_s)


async def test_a_paused_batcher_prepares_nothing_more():
    async with serving() as service:
        service.batcher.pause()
        tasks = await service.queue("a", "b")
        await asyncio.sleep(0.01)
        assert service.ahead.calls == service.model.calls == []
        service.batcher.resume()
        assert [answer.upper() for answer in await asyncio.gather(*tasks)] == ["A!", "B!"]
