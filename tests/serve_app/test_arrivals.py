"""Senders that are slow on purpose keep nobody out, and hold little memory."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from serve_app.http import arrivals
from serve_app.http.ingress import create_api
from serve_app.settings import Batching

from .asgi_client import IMAGE, QUESTION, Client, sent, until
from .http_cases import PNG, PNG_BASE64, FakeBackend, make_settings

pytestmark = pytest.mark.anyio
FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
FORM_HEAD = b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"prompts": ["crack"]}\r\n'
FORM_IMAGE = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


def slow(api: Any, headers: dict[str, str] = IMAGE, first: bytes = PNG[:1]) -> Client:
    """A request that has sent its first bytes."""
    client = Client(api, "/v1/segment", headers, query=QUESTION if headers["content-type"] == "image/png" else "")
    client.body(first, more=True)
    return client


async def dribble(client: Client, every_s: float, num_bytes: int = 1) -> None:
    while not client.task.done():
        client.body(bytes(num_bytes), more=True)
        await asyncio.sleep(every_s)


async def test_two_hundred_slow_senders_and_honest_requests_beside_them():
    most = 50
    api = create_api(make_settings(max_in_flight=most), FakeBackend())
    senders = [slow(api) for _ in range(200)]
    dribbling = [asyncio.create_task(dribble(client, 0.05)) for client in senders]
    await until(lambda: sum(client.task.done() for client in senders) == len(senders) - most)
    for _ in range(20):
        honest = [sent(api) for _ in range(5)]
        assert [(await client.answer())[0] for client in honest] == [200] * 5
        await asyncio.sleep(0.01)
    ended = [client for client in senders if client.task.done()]
    assert len(ended) >= len(senders) - most
    for client in ended:
        status, answer = await client.answer()
        # Those that had just begun may have been a burst: they are told to come again.
        assert (status, answer["error"]["type"]) in ((408, "slow_body"), (503, "overloaded"))
        assert status == 503 or (b"connection", b"close") in client.sent[0]["headers"]
    for client in senders:
        client.leave()
    await asyncio.gather(*dribbling)
    assert (await sent(api).answer())[0] == 200


async def test_an_honest_sender_that_takes_a_while_is_not_the_slowest():
    """It has sent nothing yet when the first of the others are ended, and is older than the last of them."""
    most = 10
    api = create_api(make_settings(max_in_flight=most), FakeBackend())
    senders = [slow(api) for _ in range(most)]
    await asyncio.sleep(0.15)
    honest = Client(api, "/v1/segment", IMAGE)
    began_s, num_sent = time.monotonic(), 0
    await asyncio.sleep(0)
    while num_sent < len(PNG):
        senders += [slow(api) for _ in range(3)]
        await asyncio.sleep(0.03)
        due = int(arrivals.FAIR_BYTES_PER_S * (time.monotonic() - began_s)) + 1
        honest.body(PNG[num_sent:due], more=True)
        num_sent = due
    honest.body(b"")
    assert (await honest.answer())[0] == 200
    assert sum(client.task.done() for client in senders) >= len(senders) - most


@pytest.mark.parametrize(
    ("headers", "first"),
    [
        (IMAGE, b""),
        (IMAGE, PNG[:100]),
        (IMAGE | {"content-length": "100000"}, PNG[:100]),
        (IMAGE | {"transfer-encoding": "chunked"}, PNG[:100]),
        (JSON, b'{"prompts": ["'),
        (JSON, f'{{"image_base64": "{PNG_BASE64[:200]}'.encode()),
        (FORM, FORM_HEAD),
        (FORM, FORM_HEAD + FORM_IMAGE + PNG[:100]),
        (FORM, b"--b\r\nContent-Disposition: form-da"),
    ],
)
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "dripping"])
async def test_a_body_that_comes_too_slowly_is_ended(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], first: bytes, drips: bool
):
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.1)
    monkeypatch.setattr(arrivals, "SLOWEST_BYTES_PER_S", 10_000)
    api = create_api(make_settings(timeout_s=20.0), FakeBackend())
    client = slow(api, headers, first)
    if drips:
        await dribble(client, 0.01)
    status, answer = await client.answer()
    assert (status, answer["error"]["type"]) == (408, "slow_body")


async def test_much_that_was_sent_at_once_buys_no_long_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.1)
    client = slow(create_api(make_settings(timeout_s=20.0), FakeBackend()), first=bytes(150_000))
    assert (await client.answer())[0] == 408


async def test_a_steady_sender_may_take_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.5)
    client = Client(create_api(make_settings(), FakeBackend()), "/v1/segment", IMAGE)
    for start in range(0, len(PNG), 400):
        client.body(PNG[start : start + 400], more=True)
        await asyncio.sleep(0.03)
    client.body(b"")
    assert (await client.answer())[0] == 200


async def test_a_body_is_not_slow_any_more_once_it_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.05)
    backend = FakeBackend(block=asyncio.Event())
    client = sent(create_api(make_settings(), backend))
    await until(lambda: bool(backend.calls))
    await asyncio.sleep(0.1)
    assert backend.block is not None
    backend.block.set()
    assert (await client.answer())[0] == 200


async def test_in_a_burst_of_quick_senders_the_next_is_told_to_come_again():
    api = create_api(make_settings(max_in_flight=3), FakeBackend())
    quick = [slow(api, first=bytes(60_000)) for _ in range(3)]
    await until(lambda: all(client.incoming.empty() for client in quick))
    status, answer = await slow(api).answer()
    assert (status, answer["error"]["type"]) == (503, "overloaded")
    assert not any(client.task.done() for client in quick)
    for client in quick:
        client.leave()
        await client.task
    for _ in range(5):
        assert (await sent(api).answer())[0] == 200  # nobody holds a place any more


async def test_bodies_hold_no_more_memory_than_the_places_for_work():
    api = create_api(make_settings(max_in_flight=2), FakeBackend())  # 2 bodies of 200,000 bytes
    first, second, third = (slow(api, first=bytes(num)) for num in (190_000, 150_000, 100_000))
    status, answer = await third.answer()  # a third body is one too many, and the others are quick
    assert (status, answer["error"]["type"]) == (503, "overloaded")
    await asyncio.sleep(0.05)
    assert not first.task.done()
    assert not second.task.done()
    for client in (first, second):
        client.leave()
        await client.task
    assert (await sent(api).answer())[0] == 200


async def test_a_body_that_arrives_when_all_places_are_taken_is_refused():
    backend = FakeBackend(block=asyncio.Event())
    settings = make_settings(max_queued=1).model_copy(update={"batching": Batching(max_rows=1)})  # 3 places
    api = create_api(settings, backend)
    late = slow(api)
    await until(lambda: late.incoming.empty())
    working = [sent(api) for _ in range(3)]
    await until(lambda: len(backend.calls) == 3)
    late.body(PNG[1:])
    status, answer = await late.answer()
    assert (status, answer["error"]["type"]) == (503, "overloaded")
    assert backend.block is not None
    backend.block.set()
    assert [(await client.answer())[0] for client in working] == [200] * 3
    assert (await sent(api).answer())[0] == 200
