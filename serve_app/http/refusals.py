"""Where a mistake that `sam3lora` found becomes an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sam3lora.errors import UserError
from serve_app.http.errors import ServeError


@contextmanager
def refuse_as(type: str, folder: Path | None = None) -> Iterator[None]:
    """A `UserError` inside becomes a `ServeError` of this type, with its message.

    Args:
        type: One of `STATUS_OF`.
        folder: What the message may name and clients should not see; only its last part is left.
    """
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
