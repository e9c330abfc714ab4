"""Requests that wait in a replica: for decoding, for the model and for their masks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sam3lora.engine import selection
from serve_app.http.errors import ServeError
from serve_app.messages import ImageFile, ImageReply, SegmentReply
from serve_app.replica import mask_encoder
from serve_app.settings import Batching, Limits

from .replica_cases import (
    LONG_S,
    Gate,
    answered,
    call,
    image,
    metric,
    refused,
    until,
    until_queued,
)

pytestmark = pytest.mark.anyio


async def test_concurrent_equal_images_are_decoded_once(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        same = [asyncio.create_task(answered(service, call(7))) for _ in range(10)]
        await until_queued(service, 10)
        same.append(asyncio.create_task(answered(service, call(7))))  # decoded, but not yet known to the model
        await until_queued(service, 11)
        gate.open.set()
        await asyncio.gather(first, *same)
        await answered(service, call(7))  # in the cache
    assert gate.decoded.count(image(7).key) == 1


async def test_one_of_many_waiting_for_a_decoder_may_leave(play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch):
    go, begun = threading.Event(), threading.Event()
    decode = gate.prepare_image

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(LONG_S)
        return decode(*args, **options)

    async with play(engine=gate) as service:
        monkeypatch.setattr(gate, "prepare_image", slow)
        leaving, staying = (asyncio.create_task(service.segment(call())) for _ in range(2))
        assert await asyncio.to_thread(begun.wait, LONG_S)
        leaving.cancel()
        await asyncio.wait([leaving])
        go.set()
        assert isinstance(await staying, SegmentReply)
    assert len(gate.decoded) == 1


@pytest.mark.parametrize(("status", "type"), [(503, "overloaded"), (429, "too_many_requests")])
async def test_one_request_too_many_is_refused_before_it_is_decoded(play: Callable, gate: Gate, status: int, type: str):
    async with play(engine=gate, limits=Limits(max_queued=2, overload_status=status)) as service:
        first = await gate.occupy(service)
        waiting = [asyncio.create_task(service.segment(call(seed))) for seed in (1, 2, 3, 4)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await until(lambda: sum(task.done() for task in waiting) == 2)
        gate.open.set()
        await first
        replies = await asyncio.gather(*waiting)
        assert [isinstance(reply, SegmentReply) for reply in replies] == [True, True, False, False]
        assert [(reply.type, reply.retry_after_s >= 1) for reply in replies[2:]] == [(type, True)] * 2
    assert set(gate.decoded) == {image(seed).key for seed in (0, 1, 2)}


async def test_a_request_that_ends_while_it_waits_is_not_computed(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        await answered(service, call(1, adapter="towers"))
        await gate.busy()
        first = await gate.occupy(service)
        leaving = asyncio.create_task(service.segment(call(1, adapter="towers")))
        await until_queued(service, 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert await metric(service, "queue_length") == 0
        assert (await refused(service, call(1, timeout_s=0.05))).type == "timeout"
        gate.open.set()
        await first
    assert [len(batch) for batch in gate.batches] == [1, 1]


async def test_a_closing_replica_finishes_its_calls_and_refuses_new_ones(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        assert await service.ready()
        first = await gate.occupy(service)
        second = asyncio.create_task(answered(service, call(1, adapter="heads")))
        while await metric(service, "queue_length") != 1:  # its adapter waits for the model thread
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        assert not await service.ready()
        assert (await refused(service, call(2))).type == "not_ready"
        assert not closing.done()
        gate.open.set()
        await asyncio.gather(first, second, closing)


class SlowMasks:
    """In place of `encode_logits`; while closed, it waits with a mask in hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.num = 0
        self._encode = selection.encode_logits
        monkeypatch.setattr(selection, "encode_logits", self)

    def __call__(self, *args: Any) -> Any:
        self.num += 1
        self.entered.release()
        assert self.open.wait(LONG_S)
        return self._encode(*args)

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=LONG_S)


async def test_requests_that_wait_for_masks_count_as_queued(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate, limits=Limits(max_queued=2)) as service:
        first = [asyncio.create_task(answered(service, call(seed))) for seed in (0, 1)]
        await masks.busy()
        await masks.busy()
        assert (await refused(service, call(2))).type == "overloaded"
        masks.open.set()
        await asyncio.gather(*first)
        await answered(service, call(2))


async def test_every_stage_works_on_another_request_at_the_same_time(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate, batching=Batching(encode_ahead=True)) as service:
        first = asyncio.create_task(answered(service, call(0)))
        await masks.busy()  # its masks are being encoded, until `masks.open` is set
        await gate.busy()
        second = await gate.occupy(service, 1)
        third = asyncio.create_task(answered(service, call(2)))
        await until(lambda: (known := gate.cached_image(image(2).key)) and gate.has_features(known, None))
        gate.open.set()
        await gate.busy()  # the third is in the model
        assert not any(task.done() for task in (first, second, third))
        masks.open.set()
        await asyncio.gather(first, second, third)
    assert [len(batch) for batch in gate.batches] == [1, 1, 1]
    assert [asked.image.features is not None for (asked,) in gate.batches] == [False, False, True]
    assert await metric(service, "images_encoded_total") == 3


async def test_an_uploaded_image_may_be_encoded_ahead(play: Callable, gate: Gate):
    async with play(engine=gate, batching=Batching(encode_ahead=True)) as service:
        first = await gate.occupy(service)
        upload = asyncio.create_task(service.keep_image(image(1)))
        await until(lambda: (known := gate.cached_image(image(1).key)) and gate.has_features(known, None))
        gate.open.set()
        await first
        assert await upload == ImageReply(image(1).key, (60, 90), cached=False)
        await answered(service, replace(call(1), image=ImageFile(image(1).key)))
        assert await metric(service, "images_encoded_total") == 2


async def test_encoding_ahead_can_be_switched_off(play: Callable, gate: Gate):
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        rest = [asyncio.create_task(answered(service, call(seed))) for seed in (1, 2)]
        await until_queued(service, 2)
        gate.open.set()
        await asyncio.gather(first, *rest)
    assert [asked.image.features for batch in gate.batches for asked in batch] == [None] * 3


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_masks_of_a_request_that_ended_are_not_encoded(
    play: Callable, gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str
):
    masks = SlowMasks(monkeypatch)
    async with play(engine=gate) as service:
        await service.keep_image(image())  # leaves little to do before the masks
        task = asyncio.create_task(service.segment(call(timeout_s=2.0 if how == "timeout" else LONG_S)))
        await masks.busy()
        if how == "cancel":
            task.cancel()
            await asyncio.wait([task])
        else:
            reply = await task
            assert isinstance(reply, ServeError)
            assert (reply.type, "masks" in reply.message) == ("timeout", True)
        masks.open.set()  # one mask is being encoded
        reply = await answered(service, call())
        assert masks.num == 1 + sum(map(len, reply.results))


async def test_the_model_pauses_while_answers_hold_too_much_memory(
    play: Callable, gate: Gate, root: Path, monkeypatch: pytest.MonkeyPatch
):
    masks = SlowMasks(monkeypatch)
    monkeypatch.setattr(mask_encoder, "MAX_WAITING_BYTES", 1)
    async with play(engine=gate) as service:
        first = await gate.occupy(service)
        rest = [asyncio.create_task(answered(service, call(seed))) for seed in (1, 2)]
        late = asyncio.create_task(refused(service, call(3, timeout_s=2.0)))
        await until_queued(service, 3)
        gate.open.set()
        await masks.busy()
        assert (await late).type == "timeout"
        await service.reconfigure({"root": str(root), "preload": ["towers"]})  # other work in the model thread goes on
        assert await metric(service, "adapters_resident") == 1
        assert len(gate.batches) == 1
        masks.open.set()
        await asyncio.gather(first, *rest)
    assert [len(batch) for batch in gate.batches] == [1, 2]
