"""What waits for the model thread of a replica: requests, with their outcome, and other work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from serve_app.http.errors import ServeError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Outcome(NamedTuple, Generic[Result]):
    """The result of one item, its waiting time, and the time that its batch ran."""

    result: Result
    waited_s: float
    ran_s: float


@dataclass(eq=False)
class Waiting(Generic[Item, Result]):
    """An item that waits.

    Attributes:
        deadline: By `time.monotonic`.
        needs_work: There is work on it that may be done ahead of its batch.
        is_prepared: That work was done.
    """

    item: Item
    rows: int
    deadline: float
    future: asyncio.Future[Outcome[Result]]
    since: float = field(default_factory=time.monotonic)
    needs_work: bool = False
    is_prepared: bool = False


@dataclass(eq=False)
class Job:
    """Work of another kind, for between two batches."""

    run: Callable[[], Any]
    future: asyncio.Future[Any]


def too_late() -> ServeError:
    return ServeError("timeout", "the time for this request is up: try again, or send a smaller request", 1.0)
