"""Errors of the service: a type that programs can tell apart, its HTTP status, and a message for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sam3lora.errors import UserError

STATUS_OF = {
    "malformed_request": 400,  # no HTTP
    "malformed_body": 400,  # no JSON, no multipart or no base64
    "unauthorized": 401,
    "not_found": 404,
    "adapter_not_found": 404,
    "image_not_found": 404,  # an image_id that was never given out, or whose image was evicted
    "mask_not_found": 404,  # a mask_id that was never given out, or whose mask or image was evicted
    "method_not_allowed": 405,
    "unknown_host": 421,  # the header Host has none of the settings' names
    "slow_body": 408,  # fewer bytes per second than the others, or than is allowed
    "body_too_large": 413,
    "image_too_large": 413,  # too many pixels
    "unsupported_media_type": 415,  # of the body
    "unsupported_image": 415,  # the image's format is not accepted
    "invalid_request": 422,  # a field that is missing, unknown, of the wrong type or out of range
    "invalid_prompt": 422,
    "invalid_box": 422,
    "invalid_click": 422,
    "invalid_mask": 422,
    "invalid_image": 422,  # cannot be decoded
    "invalid_adapter": 422,  # the id breaks the pattern, or its folder cannot be served
    "wrong_task": 422,  # an adapter that is asked for what those of another task do
    "answer_too_large": 422,
    "too_many_requests": 429,  # replaces `overloaded` where the settings ask for 429
    "headers_too_large": 431,
    "internal": 500,
    "no_click_head": 501,  # the base model has no tracker, or the settings leave it out
    "overloaded": 503,
    "out_of_memory": 503,
    "replica_failed": 503,
    "not_ready": 503,
    "timeout": 504,
}
"""Error type -> HTTP status. 400: the body is not what its header says. 422: it is, but the request is impossible."""

FIELD_OF = {
    "adapter_not_found": "adapter",
    "invalid_adapter": "adapter",
    "wrong_task": "adapter",
    "image_not_found": "image_id",
    "image_too_large": "image",
    "unsupported_image": "image",
    "invalid_image": "image",
}
"""Error type -> the field at fault, of types that are about one field. `image`: the image in whatever form it came."""


@dataclass(eq=False)
class ServeError(Exception):
    """A response other than 200.

    Replicas return it as a value: Ray would log a raised one together with the arguments of the call.

    Attributes:
        type: One of `STATUS_OF`.
        message: What was expected, what came and what to do; holds no more of the request than names and numbers.
        retry_after_s: When another attempt may succeed; becomes the header `Retry-After`, rounded up.
        field: The part of the request at fault, such as `prompts[3]`; None if it is the request as a whole.
    """

    type: str
    message: str
    retry_after_s: float | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        self.field = self.field or FIELD_OF.get(self.type)
        super().__init__(self.type, self.message, self.retry_after_s, self.field)

    @property
    def status(self) -> int:
        return STATUS_OF[self.type]


def answer_too_large(
    num_bytes: int, most_bytes: int, advice: str = "ask for fewer prompts or detections"
) -> ServeError:
    message = f"the answer has {num_bytes} bytes, expected at most {most_bytes}: {advice}"
    return ServeError("answer_too_large", message)


def no_click_head(field: str | None = None) -> ServeError:
    message = (
        "this service answers no clicks: they need a base model with a tracker, such as facebook/sam3, and the setting "
        "`clicks` not false"
    )
    return ServeError("no_click_head", message, field=field)


@contextmanager
def refuse_as(type: str, folder: Path | None = None) -> Iterator[None]:
    """Turn a `UserError` into a `ServeError` of this type. Of the folder's path clients see only the last part."""
    try:
        yield
    except UserError as error:
        raise ServeError(type, _without_paths(str(error), folder)) from None


def _without_paths(message: str, folder: Path | None) -> str:
    if folder is None:
        return message
    for path in (folder, folder.resolve()):
        message = message.replace(f"{path}/", "").replace(str(path), folder.name)
    for parent in (folder.parent, folder.parent.resolve()):
        message = message.replace(f"{parent}/", "")
    return message
