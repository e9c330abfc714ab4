"""A batch that is too large for the memory is done in halves, down to single items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_halves(
    attempt: Callable[[list[Item]], Sequence[Result] | None],
    items: list[Item],
    free_memory: Callable[[int], object],
) -> list[Result | None]:
    """The results of items that are computed together, or in halves where that fails.

    Args:
        attempt: Computes some items; None says that fewer may succeed. It catches the exception itself: returned, its
            traceback would keep the batch's tensors alive during the next attempt.
        free_memory: Called with the number of items after each failed attempt. A single item gets one further attempt.

    Returns:
        For each item its result, or None if it failed alone.
    """
    results = attempt(items)
    if results is None:
        free_memory(len(items))
        if len(items) > 1:
            half = len(items) // 2
            parts = items[:half], items[half:]
            return [result for part in parts for result in run_in_halves(attempt, part, free_memory)]
        results = attempt(items)
    return [None] * len(items) if results is None else list(results)
