"""Where the settings of the next trial come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from sam3lora.errors import UserError
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.space.parameters import Choice, Grid
from sam3lora.tune.space.rules import MOST_TRIALS
from sam3lora.tune.space.search_space import SearchSpace

_ATTEMPTS_AT_A_GRID_POINT = 10


class Sampler(Protocol):
    """Proposes values. Which of them are trained, and how often one is asked again, is decided by `Proposer`."""

    def propose(self, number: int, attempt: int) -> dict[str, Any] | None:
        """Values of all parameters for a trial, tied ones too; None if nothing is left to try.

        Args:
            number: Of the trial.
            attempt: From 0; how many proposals for it were rejected.
        """

    def observe(self, record: TrialRecord) -> None:
        """Learn from a trial that has ended, also from those of an earlier session before the first proposal."""

    def reject(self, number: int, values: dict[str, Any]) -> None:
        """The values proposed last for a trial are not trained."""


def build_sampler(space: SearchSpace) -> Sampler:
    """The sampler that ``search.algorithm`` names.

    Raises:
        UserError: optuna is asked for and not installed.
    """
    if space.search.algorithm == "grid":
        return GridSampler(space)
    if space.search.algorithm == "optuna":
        from sam3lora.tune.search.optuna_sampler import OptunaSampler

        return OptunaSampler(space)
    return RandomSampler(space)


class GridCycle:
    """The combinations of the `Grid` parameters, in a shuffled order that is gone through again and again.

    Trials in a row get different ones, so that after any number of trials each was visited equally often, give or
    take one. Of more combinations than a sweep has trials, so many are chosen by chance, each once.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._values = {key: item.values for key, item in space.parameters.items() if isinstance(item, Grid)}
        size = math.prod(map(len, self._values.values()))
        self._order = np.random.default_rng(space.search.seed).choice(size, min(size, MOST_TRIALS), replace=False)
        self._first = 1 if space.search.include_base else 0

    def point(self, number: int, attempt: int) -> dict[str, Any]:
        """The combination for a trial; one that is rejected again and again gives way to the next."""
        place = number - self._first + attempt // _ATTEMPTS_AT_A_GRID_POINT
        index = int(self._order[place % len(self._order)])
        point = {}
        for key, values in self._values.items():
            index, digit = divmod(index, len(values))
            point[key] = values[digit]
        return point


class RandomSampler:
    """Independent draws. A trial's values depend on its number alone, so a resumed sweep goes on as it began."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._cycle = GridCycle(space)

    def propose(self, number: int, attempt: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._space.search.seed, number, attempt])
        drawn = {key: item.draw(rng) for key, item in self._space.free.items() if not isinstance(item, Grid)}
        return self._space.complete(drawn | self._cycle.point(number, attempt))

    def observe(self, record: TrialRecord) -> None:
        pass

    def reject(self, number: int, values: dict[str, Any]) -> None:
        pass


class GridSampler:
    """Every combination once, in the order of the file; the last parameter changes fastest."""

    def __init__(self, space: SearchSpace) -> None:
        self._points = grid_points(space)

    def propose(self, number: int, attempt: int) -> dict[str, Any] | None:
        return next(self._points, None)

    def observe(self, record: TrialRecord) -> None:
        pass

    def reject(self, number: int, values: dict[str, Any]) -> None:
        pass


def grid_points(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """The values of every combination of choices.

    Raises:
        UserError: a parameter is a range.
    """
    choices = {}
    for key, item in space.free.items():
        if not isinstance(item, Choice):
            raise UserError(f"parameters.{key}: {item.kind} has no list of values: write grid or choice")
        choices[key] = item.values
    for point in itertools.product(*choices.values()):
        yield space.complete(dict(zip(choices, point)))
