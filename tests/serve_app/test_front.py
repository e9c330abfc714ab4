"""Ray Serve's HTTP process around the application: its own answers, headers of clients, limits of heads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http import front
from serve_app.http.answers import SECURITY_HEADERS
from serve_app.http.schemas import ErrorResponse

OURS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


def serve_like(status: int | None, text: bytes = b"of Ray", *, ours: bool = False) -> ASGIApp:
    """What Ray's proxy may do: answer by itself, pass an answer on, or return without any (a process died)."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        app.seen = dict(scope["headers"])  # type: ignore[attr-defined]
        if status is not None:
            headers = [(b"content-type", b"text/plain"), *(OURS if ours else [])]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text})

    return app


async def ask(app: ASGIApp, path: str = "/v1/segment", **headers: bytes) -> tuple[int, dict[str, str], bytes]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    given = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": "GET", "headers": given}
    await front.Front(app)(scope, receive, send)
    found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("rays", "status", "type"),
    [
        (404, 503, "not_ready"),  # before the application is there, and after it was taken away
        (None, 503, "replica_failed"),
        (500, 503, "replica_failed"),
        (503, 503, "overloaded"),
        (408, 504, "timeout"),
    ],
)
async def test_rays_own_answers_become_ours(rays: int | None, status: int, type: str) -> None:
    code, headers, body = await ask(serve_like(rays), x_request_id=b"a1")
    assert (code, headers["x-request-id"]) == (status, "a1")
    error = ErrorResponse.model_validate_json(body).error
    assert (error.type, error.request_id) == (type, "a1")
    assert ("retry-after" in headers) == (status == 503)


@pytest.mark.anyio
async def test_an_exception_of_ray_is_no_answer_of_its_own() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    assert (await ask(broken))[0] == 503


@pytest.mark.anyio
async def test_the_applications_answers_pass_unchanged() -> None:
    for status in (200, 404, 500):
        assert (await ask(serve_like(status, b"ours", ours=True)))[::2] == (status, b"ours")


@pytest.mark.anyio
async def test_of_rays_own_paths_only_the_health_check_is_open() -> None:
    assert (await ask(serve_like(200, b"success"), "/-/healthz"))[::2] == (200, b"success")
    assert (await ask(serve_like(200, b'{"/": "sam3lora"}'), "/-/routes"))[0] == 404


@pytest.mark.anyio
@pytest.mark.parametrize("given", [b"\xff\xfe", b"", b"x" * 201, b"a\tb"])
async def test_a_request_id_that_cannot_be_repeated_is_replaced(given: bytes) -> None:
    app = serve_like(404)
    _, headers, body = await ask(app, x_request_id=given)
    assert len(headers["x-request-id"]) == 32
    assert json.loads(body)["error"]["request_id"] == headers["x-request-id"]
    assert app.seen[b"x-request-id"].decode() == headers["x-request-id"]  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_clients_give_no_commands_to_serve() -> None:
    app = serve_like(200, ours=True)
    await ask(
        app,
        x_request_timeout_seconds=b"0.001",
        x_request_disconnect_disabled=b"?1",
        serve_multiplexed_model_id=b"\xff",
        x_session_id=b"all-to-one",
        x_api_key=b"kept",
    )
    assert set(app.seen) == {b"x-api-key", b"x-request-id"}  # type: ignore[attr-defined]


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    front.middlewares()
    config = uvicorn.Config(front.Front(app), port=0, lifespan="off", log_config=None, timeout_keep_alive=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        if scope["path"] == "/slow":
            await asyncio.sleep(0.5)
        if scope["path"] == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": OURS})
            await send({"type": "http.response.body", "body": bytes(100 << 20)})
            return
        while (message := await receive())["type"] == "http.request":
            size += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [*OURS, (b"content-length", b"8")]})
        await send({"type": "http.response.body", "body": b"%8d" % size})

    with listening(app) as found:
        yield found


def talk(port: int, *pieces: bytes, timeout_s: float = 10.0) -> bytes:
    """Send all, then read until the server closes the connection. ConnectionError: it was reset."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
        return received


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), ErrorResponse.model_validate_json(body).error.type


CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"X-Long: " + b"x" * 70_000 + b"\r\n\r\n", id="one long header"),
        pytest.param(b"X-Long: " + b"x" * 3_000_000, id="one that is never whole"),
        pytest.param(b"\r\n".join(b"X-%d: y" % number for number in range(300)), id="many"),
        pytest.param(b"\r\n".join(b"X-%d: " % number + b"y" * 900 for number in range(100)), id="many bytes"),
    ],
)
def test_large_heads_are_refused(port: int, head: bytes) -> None:
    assert error_of(talk(port, b"GET / HTTP/1.1\r\nHost: a\r\n", head)) == (431, "headers_too_large")


def test_a_refused_client_that_stays_is_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LINGER_S", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert error_of(connection.recv(1 << 16)) == (400, "malformed_request")
        with pytest.raises(ConnectionError):
            send_slowly(connection, b"x" * 200)


def test_a_head_is_refused_once(port: int) -> None:
    """Though it has a character that no header has, and is too large with the piece that holds this."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 60_000, b"a" * 9_000 + b"\x00"):
            connection.sendall(piece)
            time.sleep(0.1)  # the server has read it
        assert error_of(connection.recv(1 << 16)) == (400, "malformed_request")
        send_slowly(connection, b"it is still listened to")


def send_slowly(connection: socket.socket, text: bytes) -> None:
    for byte in text:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def test_a_long_target_is_refused(port: int) -> None:
    assert error_of(talk(port, b"GET /", b"x" * 100_000)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"0\r\nX: ", id="trailer"),
        pytest.param(b"1;", id="extension of a chunk"),
        pytest.param(b"1\r\nz\r\n0\r\nX: ", id="trailer behind a body"),
    ],
)
def test_what_a_chunked_body_holds_besides_is_bounded(port: int, endless: bytes) -> None:
    # httptools puts such a text together in quadratic time, and tells nobody.
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + endless)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                sent += connection.send(b"a" * (1 << 16))
    assert sent < 16 << 20  # what fits into the buffers of both ends


def test_trailers_are_few(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    received = talk(port, head + b"".join(b"X-%d: y\r\n" % number for number in range(300)))
    assert b"200 OK" not in received


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ],
)
def test_there_are_no_websockets(port: int, request_text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request_text)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_body_with_a_broken_chunk_gets_our_error(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert error_of(talk(port, head, b"ZZ\r\n")) == (400, "malformed_request")


@pytest.mark.parametrize("behind", [b"\x16\x03 no HTTP\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHos"])
def test_a_fault_behind_a_request_does_not_take_its_answer(
    port: int, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "HEADER_TIMEOUT_S", 0.2)
    slow = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    assert talk(port, slow + behind).startswith(b"HTTP/1.1 200")
    assert talk(port, slow + slow + behind).count(b"HTTP/1.1 200") == 2


def test_neither_does_much_behind_a_request(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LINGER_BYTES", 10_000)
    slow = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    much = b"no HTTP\r\n\r\n" + bytes(200_000)
    assert talk(port, slow, much).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_gets_our_error(port: int) -> None:
    assert error_of(talk(port, b"\x16\x03\x01 hello\r\n\r\n")) == (400, "malformed_request")


def test_large_bodies_and_several_requests_on_a_connection_pass(port: int) -> None:
    body = b"z" * 400_000
    post = b"POST / HTTP/1.1\r\nHost: a\r\nX-Some: " + b"h" * 30_000 + b"\r\nContent-Length: %d\r\n" % len(body)
    answer = talk(port, post + b"\r\n" + body + post + b"\r\n" + body, post + CLOSE + b"\r\n" + body)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.count(b"  400000") == 3


def test_a_head_that_does_not_end_in_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEADER_TIMEOUT_S", 0.2)
    assert error_of(talk(port, b"GET / HTTP/1.1\r\nHost: ")) == (504, "timeout")
    assert talk(port) == b""  # nothing was sent: closed without a word


def test_an_empty_line_keeps_no_connection_open(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEADER_TIMEOUT_S", 0.2)
    assert talk(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n").count(b"HTTP/1.1 200") == 1


def test_who_stops_the_service_sees_answers_that_are_not_sent_yet(port: int) -> None:
    def num_busy() -> int:
        answer = talk(port, b"GET /-/busy HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n")
        return int(answer.partition(b"\r\n\r\n")[2])

    deadline = time.monotonic() + 10
    while num_busy() and time.monotonic() < deadline:  # of the tests before
        time.sleep(0.05)
    assert num_busy() == 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow_reader:
        slow_reader.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow_reader.recv(1000)
        time.sleep(0.1)
        assert num_busy() == 1  # the application is done, its answer is not sent
    while num_busy() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_busy() == 0


def test_who_stops_the_service_does_not_wait_for_a_refused_client(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as refused:
        refused.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n")
        assert error_of(refused.recv(1 << 16)) == (400, "malformed_request")
        answer = talk(port, b"GET /-/busy HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n")
        assert answer.endswith(b"\r\n\r\n0")


def test_a_slow_body_is_not_a_slow_head(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEADER_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1")
        time.sleep(0.5)
        connection.sendall(b"2")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        # The next request on this connection has its own time.
        connection.sendall(b"GET / HT")
        assert error_of(connection.recv(1 << 16)) == (504, "timeout")
