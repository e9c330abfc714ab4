"""What Ray Serve's HTTP process does around the application: its own answers in our form, and bounded headers.

Ray calls `middlewares` in each process that listens for HTTP, by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` (see
`serve_app.settings`). Nothing heavy is imported here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from typing import Any
from weakref import WeakSet

import uvicorn.config
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.http.answers import SECURITY_HEADERS, error_answer, raw_error_answer
from serve_app.http.errors import ServeError

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1 << 16
MAX_HEADERS = 200
HEADER_TIMEOUT_S = 15.0
LINGER_S = 2.0
LINGER_BYTES = 4 << 20
"""A refused client is listened to for so long at most: closing on what it still sends would reset the connection, and
that can take the answer from the client."""

_REQUEST_ID = re.compile(rb"[ -~]{1,200}")
_MARK = next(iter(SECURITY_HEADERS)).lower().encode()  # on every answer of the application, on none of Ray's own
_OPEN_TO_RAY = "/-/healthz"  # KubeRay asks it
NUM_BUSY = "/-/busy"
"""Path of the number of connections whose answers are under way; who stops the service waits for 0."""

_CONNECTIONS: WeakSet[BoundedHttp] = WeakSet()
_COMMANDS = frozenset(  # headers by which a client could change how Serve treats its request
    (
        b"serve-multiplexed-model-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
    )
)


def middlewares() -> list[Middleware]:
    """Called by Ray Serve before it listens; also puts `BoundedHttp` in the place of uvicorn's protocol."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttp.__name__}"
    return [Middleware(Front)]


class Front:
    """ASGI middleware around Ray Serve's proxy: what Ray answers by itself becomes the service's JSON.

    Ray answers 404 in plain text while there is no application (it starts, or it stops), and 500 when the process that
    worked on a request died. Both pass, so both become 503 with `Retry-After`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, request_id = _checked(scope["headers"])
        scope = {**scope, "headers": headers}
        path = scope["path"]
        has_started = is_replaced = False

        async def answer(error: ServeError) -> None:
            await error_answer(error, request_id.decode(), {"X-Request-ID": request_id.decode()})(scope, receive, send)

        async def checked_send(message: Message) -> None:
            nonlocal has_started, is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start":
                has_started = True
                is_ours = any(name.lower() == _MARK for name, _ in message.get("headers", ()))
                if not is_ours and path != _OPEN_TO_RAY:
                    is_replaced = True
                    await answer(_meaning(message["status"]))
                    return
            await send(message)

        if path == NUM_BUSY:
            others = sum(one.is_busy for one in _CONNECTIONS) - 1  # without this one
            await PlainTextResponse(str(others))(scope, receive, send)
            return
        if not path.startswith("/") or (path.startswith("/-/") and path != _OPEN_TO_RAY):
            await answer(ServeError("not_found", "no such path: GET /docs lists all paths"))
            return
        try:
            await self._app(scope, receive, checked_send)
        except Exception as error:
            if has_started:
                raise  # too late for another answer: the connection is closed
            logger.warning("request %s failed: %s", request_id.decode(), type(error).__name__)
        if not has_started:  # so Ray says that the process that worked on the request died
            await answer(_meaning(500))


def _checked(headers: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers without commands to Serve, and with one request id, which Serve can read."""
    kept = [(name, value) for name, value in headers if name.replace(b"_", b"-") not in _COMMANDS]
    given = next((value for name, value in kept if name == b"x-request-id"), b"")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
    return [
        *((name, value) for name, value in kept if name != b"x-request-id"),
        (b"x-request-id", request_id),
    ], request_id


def _meaning(status: int) -> ServeError:
    """An answer of Ray's own in our words."""
    if status == 408:
        return ServeError("timeout", "no answer in time: try again later")
    if status in (429, 503):
        return ServeError("overloaded", "more requests are under way than the service takes: try again later", 2.0)
    if status == 404:
        return ServeError("not_ready", "the service starts or stops: try again in a few seconds", 2.0)
    return ServeError("replica_failed", "the process that worked on the request died: try again", 2.0)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with limits on what is no body: bytes and number of headers, time, and no websockets."""

    _has_begun = False  # a request
    _is_over = False
    _head_bytes = 0  # of the target, and of the headers and trailers that are whole
    _pending_bytes = 0  # of what httptools still collects: one header, trailer or line
    _has_parsed = False
    _ignored_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _refusal = ServeError("malformed_request", "expected an HTTP/1.1 request")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_awaited(self) -> bool:
        """Whether an answer is under way that the client will get."""
        return self._is_answering and not self.cycle.disconnected

    @property
    def is_busy(self) -> bool:
        """Whether a client still waits for an answer, or a part of one is not sent."""
        return self._is_awaited or (self.transport is not None and self.transport.get_write_buffer_size() > 0)

    def connection_made(self, transport: Any) -> None:
        _CONNECTIONS.add(self)
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            if not self._is_awaited:  # earlier requests are answered, whatever comes behind them
                self._ignored_bytes += len(data)
            if self._ignored_bytes > LINGER_BYTES:
                self.transport.close()
            return
        if not self._is_answering:
            self._start_timer()  # also for an empty line, which begins no request
        self._has_parsed = False
        super().data_received(data)
        self._pending_bytes = 0 if self._has_parsed else self._pending_bytes + len(data)
        if self._pending_bytes > MAX_HEADER_BYTES and not self._is_over:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        self._has_parsed = self._has_begun = True
        self._head_bytes = 0
        self._start_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_parsed = True
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_parsed = True
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._has_parsed = True

    def on_message_complete(self) -> None:
        self._has_parsed = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for what is no HTTP, and for an exception in a method above."""
        self._refuse(self._refusal)

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to say: the request is answered as HTTP."""

    def _count(self, num_bytes: int) -> None:
        self._has_parsed = True
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refusal = _too_large()
            raise ValueError  # stops the parser

    def _is_late(self) -> None:
        self._timer = None
        self._refuse(ServeError("timeout", f"no whole request head within {HEADER_TIMEOUT_S:g} s"))

    def _refuse(self, error: ServeError) -> None:
        """End the connection, with this answer where it is this request's turn; earlier requests are answered first."""
        self._is_over = True
        self._stop_timer()
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        if last is not None and not last.response_complete and not last.more_body:
            last.keep_alive = False  # closes after the answer
            return
        if last is not None and not last.response_complete:  # the fault is in its body
            last.disconnected = True
            last.message_event.set()
        is_turn = not self.pipeline and (last is None or last.response_complete or not last.response_started)
        if self._has_begun and is_turn and not self.transport.is_closing():
            self.transport.write(raw_error_answer(error))
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Close when the client has, or when it has been listened to for long enough."""
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._is_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large() -> ServeError:
    message = f"expected at most {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them: send data in the body"
    return ServeError("headers_too_large", message)
