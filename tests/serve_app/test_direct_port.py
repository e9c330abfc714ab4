"""The port of an HTTP process that listens itself: taken for a while, taken for good, and on which address."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from starlette.responses import PlainTextResponse

from sam3lora.errors import UserError
from serve_app.direct_port import patient_start

pytestmark = pytest.mark.anyio
HOST = "127.0.0.2"  # another than Ray's own HTTP process has


@contextlib.asynccontextmanager
async def _listening(port: int, *, host: str = HOST, wait_s: float = 5) -> AsyncIterator[None]:
    """A server by Ray's own function, whose options name another address, as those of the other HTTP process do."""
    start = patient_start(start_asgi_http_server, host, wait_s=wait_s)
    options = HTTPOptions(host="127.0.0.1", port=port)
    task, server = await start(PlainTextResponse("here"), options, event_loop=asyncio.get_running_loop())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await task


async def _answer(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


def _taken() -> tuple[socket.socket, int]:
    other = socket.create_server((HOST, 0))
    return other, other.getsockname()[1]


async def test_it_listens_on_the_address_of_the_service_alone():
    other, port = _taken()
    other.close()
    async with _listening(port):
        assert (await _answer(HOST, port)).endswith(b"here")
        with pytest.raises(ConnectionRefusedError):
            await _answer("127.0.0.1", port)


async def test_a_port_that_is_taken_for_a_moment_is_waited_for():
    other, port = _taken()
    asyncio.get_running_loop().call_later(0.3, other.close)
    async with _listening(port):
        assert (await _answer(HOST, port)).endswith(b"here")


async def test_the_connections_of_a_process_that_died_do_not_block_its_port():
    other, port = _taken()
    client = socket.create_connection((HOST, port))
    accepted, _ = other.accept()
    for one in (other, accepted, client):  # the side that closes first keeps the connection in TIME_WAIT
        one.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind((HOST, port))
    async with _listening(port, wait_s=0):
        assert (await _answer(HOST, port)).endswith(b"here")


async def test_a_port_that_stays_taken_is_told():
    other, port = _taken()
    with other, pytest.raises(UserError, match=rf"{HOST}:{port}: Address already in use.*--port"):
        async with _listening(port, wait_s=0.3):
            pass


async def test_an_address_of_another_machine_is_told_at_once():
    with pytest.raises(UserError, match=r"192\.0\.2\.1:8000: Cannot assign"):
        async with _listening(8000, host="192.0.2.1", wait_s=60):
            pass


async def test_what_is_no_matter_of_the_port_is_not_hidden():
    async def start(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        await patient_start(start, HOST)(None, HTTPOptions())
