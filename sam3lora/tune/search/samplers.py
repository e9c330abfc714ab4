"""Samplers: random and grid search over the parameters of a space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sam3lora.errors import UserError
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.space.parameters import Choice
from sam3lora.tune.space.search_space import MOST_TRIALS, SearchSpace

_ATTEMPTS_AT_A_GRID_POINT = 10


class Sampler:
    """Proposes values. `Proposer` decides which of them are trained, and how often to ask again."""

    def propose(self, number: int, attempt: int) -> dict[str, Any] | None:
        """Values of all parameters for a trial, tied ones included; None if nothing is left to try.

        `attempt` counts the proposals for this trial that were rejected.
        """
        raise NotImplementedError

    def observe(self, record: TrialRecord) -> None:
        """Learn from a trial that has ended."""

    def reject(self, number: int) -> None:
        """The values proposed last for a trial are not trained."""


class GridCycle:
    """The combinations of the `grid` parameters, in a shuffled order that is repeated without end.

    Successive trials get different ones, so that after any number of trials each was visited equally often, give or
    take one. If there are more combinations than a sweep may have trials, a random subset of them is used.
    """

    def __init__(self, space: SearchSpace) -> None:
        grids = {key: item for key, item in space.free.items() if isinstance(item, Choice) and item.kind == "grid"}
        self._values = {key: item.values for key, item in grids.items()}
        size = math.prod(map(len, self._values.values()))
        self._order = np.random.default_rng(space.search.seed).choice(size, min(size, MOST_TRIALS), replace=False)
        self._first = 1 if space.search.include_base else 0

    def point(self, number: int, attempt: int) -> dict[str, Any]:
        """The combination for a trial; after several rejections the next one."""
        place = number - self._first + attempt // _ATTEMPTS_AT_A_GRID_POINT
        index = int(self._order[place % len(self._order)])
        point = {}
        for key, values in self._values.items():
            index, digit = divmod(index, len(values))
            point[key] = values[digit]
        return point


class RandomSampler(Sampler):
    """Independent draws. The seed, the trial's number and the attempt determine the values, so that a resumed sweep
    draws the same ones."""

    def __init__(self, space: SearchSpace) -> None:
        self._space, self._cycle = space, GridCycle(space)

    def propose(self, number: int, attempt: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._space.search.seed, number, attempt])
        drawn = {key: item.draw(rng) for key, item in self._space.free.items() if item.kind != "grid"}
        return self._space.complete(drawn | self._cycle.point(number, attempt))


class GridSampler(Sampler):
    """Every combination once, in the order of the file; the last parameter changes fastest."""

    def __init__(self, space: SearchSpace) -> None:
        self._points = grid_points(space)

    def propose(self, number: int, attempt: int) -> dict[str, Any] | None:
        return next(self._points, None)


def grid_points(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """The values of every combination of choices.

    Raises:
        UserError: A parameter is a range.
    """
    choices = {}
    for key, item in space.free.items():
        if not isinstance(item, Choice):
            raise UserError(f"parameters.{key}: {item.kind} has no list of values: write grid or choice")
        choices[key] = item.values
    for point in itertools.product(*choices.values()):
        yield space.complete(dict(zip(choices, point)))
