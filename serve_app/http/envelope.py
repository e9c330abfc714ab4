"""Middleware around every request: request id, API key, errors as JSON, security headers and metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence

from starlette._utils import get_route_path  # the one that routes are matched by
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.answers import SECURITY_HEADERS, error_answer
from serve_app.http.auth import is_allowed, is_open
from serve_app.http.errors import ServeError
from serve_app.http.origins import PROBES, check_host, cors_headers, preflight
from serve_app.metrics import IngressMetrics

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SENT_BY_SERVE = re.compile(r"[ -~]{1,200}")  # Serve returns any header; the body repeats only such a one


class Envelope:
    """ASGI middleware. `request.state` gets `request_id` and `started_s` (of `time.monotonic`).

    Args:
        keys: API keys; without any, every request is allowed.
        allowed_hosts: Names under which the service may be called; None for any.
        cors_origins: Other sites whose pages may call it.
        routes: Paths that are counted by name.
        sends_request_id: Whether to send the header `X-Request-ID`. Ray Serve sends it itself, with the client's
            header unchanged; that is then the request's id.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[bytes],
        metrics: IngressMetrics,
        allowed_hosts: Sequence[str] | None = None,
        cors_origins: Sequence[str] = (),
        routes: frozenset[str] = frozenset(),
        sends_request_id: bool = True,
    ) -> None:
        self._sends_request_id = sends_request_id
        self._accepted_id = _REQUEST_ID if sends_request_id else _SENT_BY_SERVE
        self._app = app
        self._keys = keys
        self._allowed_hosts = allowed_hosts
        self._cors_origins = cors_origins
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        path = get_route_path(scope)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not self._accepted_id.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        state = {**scope.get("state", {}), "request_id": request_id, "started_s": started_s, "outcome": "ok"}
        is_head = scope["method"] == "HEAD"
        # Pages are small, and a part of one is of no use: RFC 9110 lets a server ignore a range.
        given = [(name, value) for name, value in scope["headers"] if name != b"range"]
        scope = {**scope, "headers": given, "state": state, "method": "GET" if is_head else scope["method"]}
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                sent = MutableHeaders(scope=message)
                if self._sends_request_id:
                    sent["X-Request-ID"] = request_id
                for name, value in (SECURITY_HEADERS | cors_headers(headers, self._cors_origins)).items():
                    sent[name] = value
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        self._metrics.in_flight.inc()
        try:
            try:
                if path not in PROBES:
                    check_host(headers, self._allowed_hosts)
                if answer := preflight(scope["method"], headers, self._cors_origins):
                    await answer(scope, receive, send_with_headers)
                    return
                if not is_open(path) and not is_allowed(headers, self._keys):
                    raise ServeError("unauthorized", "expected an API key: send Authorization: Bearer KEY or X-API-Key")
                await self._app(scope, receive, send_with_headers)
            except ServeError as error:
                await _answer(error, Request(scope), receive, send_with_headers)
            except (ClientDisconnect, asyncio.CancelledError):
                state["outcome"] = "cancelled"
                raise
            except Exception as error:
                log_bug(request_id, error)
                if has_started:  # too late for another response: close the connection
                    state["outcome"] = "internal"
                    raise ConnectionAbortedError from None
                hidden = ServeError("internal", "the service failed: its log has the reason under the request id")
                await _answer(hidden, Request(scope), receive, send_with_headers)
        except ClientDisconnect:
            pass
        finally:
            self._metrics.in_flight.dec()
            route = path if path in self._routes else "/static" if path.startswith("/static/") else "other"
            self._metrics.finished(route, state["outcome"], time.monotonic() - started_s)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors (unknown path or method) as our JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = [method.strip() for method in (error.headers or {}).get("Allow", "GET").split(",")]
        allowed += ["HEAD"] if "GET" in allowed and "HEAD" not in allowed else []
        methods = ", ".join(sorted(allowed))
        response = error_response(request, ServeError("method_not_allowed", f"expected {methods}"))
        response.headers["Allow"] = methods
        return response
    if error.status_code == 404:
        return error_response(request, ServeError("not_found", "no such path: GET /docs lists all paths"))
    raise error


def error_response(request: Request, error: ServeError) -> Response:
    request.state.outcome = error.type
    return error_answer(error, request.state.request_id)


def log_bug(request_id: str, error: BaseException) -> None:
    """Log where it happened, without the exception's message, which may hold a part of the request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__qualname__, frames)


async def _answer(error: ServeError, request: Request, receive: Receive, send: Send) -> None:
    await error_response(request, error)(request.scope, receive, send)
