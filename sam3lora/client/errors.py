"""Exceptions of the client: one class for each reaction that a program may have."""

from __future__ import annotations


class SegmentationError(Exception):
    """A call failed.

    Attributes:
        type: The service's error type, such as "adapter_not_found"; "connection_failed" or "timeout" without any;
            "http_502" and the like if something else responded in the service's place.
        message: What was expected, what came and what to do.
        status: HTTP status; None without a response.
        request_id: Id of the call in the service's log.
        retry_after_s: When another attempt may succeed, if the service said so.
        field: The part of the request at fault, such as "prompts[3]"; None if it is the request as a whole.
    """

    def __init__(
        self,
        type: str,
        message: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.message = message
        self.status = status
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.field = field

    def __str__(self) -> str:
        where = [self.type, *([f"HTTP {self.status}"] if self.status else [])]
        return f"{self.message} ({', '.join([*where, f'request {self.request_id}'])})"


class Unauthorized(SegmentationError):
    """401, 403: the API key is missing or wrong."""


class NotFound(SegmentationError):
    """404: no such adapter, image or path."""


class InvalidRequest(SegmentationError):
    """Another 4xx: the image or the request is invalid; the same call will fail again."""


class Overloaded(SegmentationError):
    """503, 429, or 502 of a proxy: overloaded, starting, stopping, or out of memory, also after all retries."""


class ServerError(SegmentationError):
    """Another 5xx, or a response that is not the service's."""


class Timeout(SegmentationError):
    """504, 408 (the request was sent too slowly), or no response within `timeout_s`."""


class ConnectionFailed(SegmentationError):
    """Nothing responds at the URL, or the connection broke, also after all retries."""


def class_of_status(status: int) -> type[SegmentationError]:
    by_status: dict[int, type[SegmentationError]] = {
        401: Unauthorized,
        408: Timeout,
        403: Unauthorized,
        404: NotFound,
        429: Overloaded,
        502: Overloaded,
        503: Overloaded,
        504: Timeout,
    }
    return by_status.get(status, InvalidRequest if 400 <= status < 500 else ServerError)
