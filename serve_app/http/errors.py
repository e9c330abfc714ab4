"""What the service answers when it cannot answer: a type that programs can tell apart, and a message for people."""

from __future__ import annotations

from dataclasses import dataclass

STATUS_OF = {
    "malformed_body": 400,  # no JSON, no multipart, no base64
    "unauthorized": 401,
    "not_found": 404,
    "adapter_not_found": 404,
    "image_not_found": 404,  # an image_id that was never given out or is no longer kept
    "method_not_allowed": 405,
    "body_too_large": 413,
    "image_too_large": 413,  # too many pixels
    "unsupported_media_type": 415,  # of the body
    "unsupported_image": 415,  # a format that is not taken
    "invalid_request": 422,  # a field that is missing, unknown, of the wrong type or out of range
    "invalid_prompt": 422,
    "invalid_box": 422,
    "invalid_image": 422,  # cannot be decoded
    "invalid_adapter": 422,  # the id breaks the pattern, or its folder cannot be served
    "too_many_requests": 429,  # as `overloaded`, where the settings ask for 429
    "internal": 500,
    "overloaded": 503,
    "out_of_memory": 503,
    "replica_failed": 503,
    "not_ready": 503,
    "timeout": 504,
}
"""Error type -> HTTP status. 400: the body is not what its header says; 422: it is, but asks for what cannot be."""


@dataclass(eq=False)
class ServeError(Exception):
    """An answer other than 200.

    Attributes:
        type: One of `STATUS_OF`.
        message: What was expected, what came and what to do; never holds more of the request than names and numbers.
        retry_after_s: When another attempt may succeed; becomes the header `Retry-After`, rounded up.
    """

    type: str
    message: str
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.type, self.message, self.retry_after_s)

    @property
    def status(self) -> int:
        return STATUS_OF[self.type]
