"""Time, load and clients that leave: against the ASGI application itself."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import serve_app.http.formats
from serve_app.http.ingress import create_api
from serve_app.messages import SegmentReply
from serve_app.settings import Batching

from .asgi_client import IMAGE, Client, sent, until
from .http_cases import PNG, SIZE_HW, FakeBackend, found, make_settings

pytestmark = pytest.mark.anyio


async def outcomes(api: Any) -> str:
    client = Client(api, "/metrics", {}, "GET")
    client.body(b"")
    await asyncio.wait_for(client.task, 20)
    return client.sent[1]["body"].decode()


@pytest.mark.parametrize("serve_cancels", [False, True])
async def test_a_client_that_disconnects_stops_the_work(serve_cancels: bool):
    """Serve cancels the task when its proxy loses the client."""
    backend = FakeBackend(block=asyncio.Event())
    api = create_api(make_settings(), backend)
    client = sent(api)
    await until(lambda: bool(backend.calls))
    if serve_cancels:
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
    else:
        client.leave()
        await asyncio.wait_for(client.task, 20)
        text = await outcomes(api)
        assert 'outcome="cancelled"' in text
        assert 'route="/v1/segment"' in text
    await until(lambda: backend.num_cancelled == 1)
    assert client.sent == []


async def test_a_client_that_disconnects_while_it_sends():
    api = create_api(make_settings(), FakeBackend())
    client = Client(api, "/v1/segment", IMAGE)
    client.body(PNG[:100], more=True)
    client.leave()
    await asyncio.wait_for(client.task, 20)
    assert client.sent == []
    assert 'outcome="cancelled"' in await outcomes(api)


@pytest.mark.parametrize("whole", [True, False], ids=["the segmenter is slow", "the body never ends"])
async def test_time_limit(whole: bool):
    backend = FakeBackend(block=asyncio.Event())
    client = Client(create_api(make_settings(timeout_s=0.05), backend), "/v1/segment", IMAGE)
    client.body(PNG, more=not whole)
    status, answer = await client.answer()
    assert (status, answer["error"]["type"]) == (504, "timeout")
    assert len(backend.calls) == whole
    await until(lambda: backend.num_cancelled == whole)


@pytest.mark.parametrize(("status", "type"), [(503, "overloaded"), (429, "too_many_requests")])
async def test_more_requests_than_the_ingress_holds(status: int, type: str):
    backend = FakeBackend(block=asyncio.Event())
    api = create_api(make_settings(max_in_flight=2, overload_status=status), backend)
    held = [sent(api) for _ in range(2)]
    await until(lambda: len(backend.calls) == 2)
    refused = sent(api)
    got, answer = await refused.answer()
    assert (got, answer["error"]["type"]) == (status, type)
    assert (b"retry-after", b"1") in refused.sent[0]["headers"]
    backend.block.set()
    for client in held:
        assert (await client.answer())[0] == 200
    assert (await sent(api).answer())[0] == 200


async def test_draining_finishes_what_is_in_progress_and_refuses_the_rest():
    backend = FakeBackend(block=asyncio.Event())
    api = create_api(make_settings(), backend)
    held = sent(api)
    await until(lambda: len(backend.calls) == 1)
    draining = asyncio.create_task(api.state.drain(20))
    await asyncio.sleep(0)
    for refused in (sent(api), Client(api, "/v1/segment", IMAGE), Client(api, "/readyz", {}, "GET")):
        status, answer = await refused.answer()
        assert (status, answer["error"]["type"]) == (503, "not_ready")
        assert (b"retry-after", b"2") in refused.sent[0]["headers"]
    assert (await Client(api, "/healthz", {}, "GET").answer())[0] == 200
    assert not draining.done()
    backend.block.set()
    assert (await held.answer())[0] == 200
    await asyncio.wait_for(draining, 20)

    stuck = FakeBackend(block=asyncio.Event())
    api = create_api(make_settings(), stuck)
    sent(api)
    await until(lambda: len(stuck.calls) == 1)
    await asyncio.wait_for(api.state.drain(0.05), 20)  # it does not wait for ever


@pytest.mark.parametrize("query", ["prompts=crack&masks=rle", "prompts=crack&masks=polygon"])
async def test_an_answer_beyond_the_limit_is_refused(query: str):
    api = create_api(make_settings(max_answer_bytes=150), FakeBackend())
    status, answer = await sent(api, query).answer()
    assert (status, answer["error"]["type"]) == (422, "answer_too_large")


async def test_requests_beyond_the_replicas_room_are_refused_unread():
    backend = FakeBackend(block=asyncio.Event())
    settings = make_settings(max_queued=1).model_copy(update={"replicas": 2, "batching": Batching(max_rows=1)})
    api = create_api(settings, backend)
    for _ in range(2 * (1 + 2)):
        sent(api)
    await until(lambda: len(backend.calls) == 6)
    status, answer = await Client(api, "/v1/segment", IMAGE).answer()  # no byte of the body was sent
    assert (status, answer["error"]["type"]) == (503, "overloaded")


@pytest.mark.parametrize(("length", "num_parts"), [("200001", 0), ("10", 5)], ids=["said at once", "said wrongly"])
async def test_a_too_large_body_is_refused_whatever_its_length_says(length: str, num_parts: int):
    client = Client(create_api(make_settings(), FakeBackend()), "/v1/segment", IMAGE | {"content-length": length})
    for _ in range(num_parts):
        client.body(bytes(50_000), more=True)
    status, answer = await client.answer()
    assert (status, answer["error"]["type"]) == (413, "body_too_large")


async def test_drawing_masks_does_not_delay_other_requests(monkeypatch: pytest.MonkeyPatch):
    """With more drawing to do than there are threads, requests are still checked, and answered without drawing."""
    release = threading.Event()
    encode = serve_app.http.formats.prompt_response

    def slow(found: Any, masks: str, *args: Any, **options: Any) -> Any:
        assert masks != "png" or release.wait(20)
        return encode(found, masks, *args, **options)

    monkeypatch.setattr("serve_app.http.formats.prompt_response", slow)
    backend = FakeBackend(answer=lambda call: SegmentReply(SIZE_HW, [found("a", 20)], {}))
    api = create_api(make_settings(), backend)
    num_held = (os.cpu_count() or 1) + 8  # more than asyncio's default threads
    held = [sent(api, "prompts=a&masks=png") for _ in range(num_held)]
    await until(lambda: len(backend.calls) == len(held))
    other = sent(api, "prompts=a&masks=rle")
    try:
        assert (await other.answer())[0] == 200
    finally:
        release.set()
    for client in held:
        assert (await client.answer())[0] == 200


async def test_a_client_that_disconnects_stops_the_drawing(monkeypatch: pytest.MonkeyPatch):
    begun: list[Callable[[], bool]] = []

    def slow(*args: Any, is_over: Callable[[], bool]) -> str:
        begun.append(is_over)
        deadline_s = time.monotonic() + 20
        while not is_over():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        begun.clear()
        raise TimeoutError

    monkeypatch.setattr("serve_app.http.formats.prompt_response", slow)
    api = create_api(make_settings(timeout_s=60.0), FakeBackend())
    client = sent(api, "prompts=a&masks=png")
    await until(lambda: len(begun) == 1)
    client.leave()
    await asyncio.wait_for(client.task, 20)
    await until(lambda: not begun)
    assert client.sent == []
    assert 'outcome="cancelled"' in await outcomes(api)
