"""Responses that carry an error, and the headers of every response."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from serve_app.http.errors import ServeError

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
}


def error_answer(error: ServeError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """The body is an `ErrorResponse`."""
    fields = {"type": error.type, "message": error.message, "request_id": request_id, "field": error.field}
    response = Response(json.dumps({"error": fields}), error.status, media_type="application/json", headers=headers)
    if error.status in (503, 429):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if error.status == 408:
        response.headers["Connection"] = "close"  # or the rest of the body would still be read
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def raw_error_answer(error: ServeError) -> bytes:
    """A whole HTTP/1.1 response that ends its connection, for what is no request yet."""
    request_id = uuid.uuid4().hex
    answer = error_answer(error, request_id, {**SECURITY_HEADERS, "X-Request-ID": request_id, "Connection": "close"})
    head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    head += [name + b": " + value for name, value in answer.raw_headers]
    return b"\r\n".join([*head, b"", bytes(answer.body)])
