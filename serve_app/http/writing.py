"""`Writing`: what a response needs to know of its request. No model here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve_app.metrics import StageClock


@dataclass(frozen=True)
class Writing:
    """A response that is being written.

    Attributes:
        clock: Of the request.
        is_over: Whether nobody waits for the response any more.
    """

    request_id: str
    clock: StageClock
    is_over: Callable[[], bool] = lambda: False
