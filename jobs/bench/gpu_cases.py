"""The cases of the GPU benchmark: each a row, measured within the time of its section, and not again if it is known."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from jobs.bench.gpu_timing import OutOfTime, Row, at_most

_UNFINISHED = ("left out", "cut", "failed")


@dataclass(frozen=True)
class GpuCase:
    """A row of a table.

    Args:
        key: What tells it from the others: the first columns.
        measure: Returns the other columns.
    """

    key: Row
    measure: Callable[[], Row]


def is_finished(row: Row) -> bool:
    """Whether there is nothing more to measure; memory that ran out is a result."""
    return not str(row.get("note", "")).startswith(_UNFINISHED)


def measure_cases(cases: Iterable[GpuCase], known: Sequence[Row], limit_s: float) -> Iterator[Row]:
    """A row for each case: a known one, what is measured, or a note that says why nothing was.

    Args:
        cases: In the order of their importance; a generator may hold what they share.
        known: Rows of an earlier call.
        limit_s: After so many seconds no case begins, and the one that is being measured ends.
    """
    end = time.monotonic() + limit_s
    for case in cases:
        kept = next((row for row in known if case.key.items() <= row.items()), None)
        row = kept or case.key | _measure(case, end - time.monotonic(), limit_s)
        if "note" in row:
            gc.collect()  # cycles may hold the tensors of a case that did not end
        yield row


def _measure(case: GpuCase, left_s: float, limit_s: float) -> Row:
    if left_s <= 0:
        return {"note": f"left out: the section has {limit_s:.0f} s"}
    try:
        with at_most(left_s):
            return case.measure()
    except OutOfTime:
        return {"note": f"cut: the section has {limit_s:.0f} s"}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except ModuleNotFoundError as error:
        return {"note": f"needs {error.name}"}
    except Exception as error:  # the time on a GPU is not lost to one case
        first_line = (str(error).splitlines() or [""])[0]
        return {"note": f"failed: {type(error).__name__}: {first_line}"}
