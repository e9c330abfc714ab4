"""A simulated user, who clicks into the middle of the largest error, and what comes of the clicks on one object.

Masks are run-length codes at the size of the image.

Shapes: `K` clicks at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sam3lora.data.rle import rle_difference
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.mask_codes import Rle
from sam3lora.evaluation.clicks.next_click import mask_iou, next_click

MAX_CLICKS = 20
"""Clicks at most for one object."""


@dataclass(frozen=True, eq=False)
class ClickedMask:
    """What a model answers to the clicks on an object so far.

    Attributes:
        choices: All masks that it chose from, where there was more than one.
        score: The IoU that the model expects of its mask, if it says so.
    """

    mask: Rle
    choices: Sequence[Rle] = ()
    score: float | None = None


@dataclass(frozen=True, eq=False)
class ObjectRun:
    """What came of the clicks on one object.

    Attributes:
        ious: float64 (K + 1,) in [0, 1], before the first click and after each. Where the user had nothing left to
            click on, the last value repeats.
        clicks: The clicks, K at most.
        oracle_iou: Of the masks to choose from after the first click, the IoU of the best; NaN without a click.
        score_error: |expected - real IoU| after the first click; NaN where the model expects nothing.
    """

    ious: np.ndarray
    clicks: tuple[Click, ...]
    oracle_iou: float
    score_error: float


class SimulatedUser:
    """Clicks on one object until it is right, or until `max_clicks`; `clicks` are those so far.

    Args:
        truth: The object.
        ignored: See `next_click`.
        found: The mask that the user starts from, such as a detector's; None is an empty one.
    """

    def __init__(
        self, truth: Rle, ignored: Rle | None = None, found: Rle | None = None, max_clicks: int = MAX_CLICKS
    ) -> None:
        self.truth = truth
        self.ignored = ignored
        self.found = rle_difference(truth, truth) if found is None else found
        self.max_clicks = max_clicks
        self.clicks: list[Click] = []
        self._ious = [self._iou(self.found)]
        self._oracle_iou = self._score_error = math.nan

    def click(self) -> bool:
        """Make the next click, if there is one to make."""
        if len(self.clicks) == self.max_clicks:
            return False
        click = next_click(self.truth, self.found, self.clicks, self.ignored)
        if click is not None:
            self.clicks.append(click)
        return click is not None

    def see(self, answer: ClickedMask) -> None:
        """Look at the answer to the clicks.

        Raises:
            ValueError: A mask has another size than the object's.
        """
        self.found = answer.mask
        iou = self._iou(answer.mask)
        self._ious.append(iou)
        if len(self.clicks) == 1:
            self._oracle_iou = max([iou, *map(self._iou, answer.choices)])
            self._score_error = math.nan if answer.score is None else abs(answer.score - iou)

    def run(self) -> ObjectRun:
        """What came of it so far."""
        ious = np.full(self.max_clicks + 1, self._ious[-1])
        ious[: len(self._ious)] = self._ious
        return ObjectRun(ious, tuple(self.clicks), self._oracle_iou, self._score_error)

    def _iou(self, found: Rle) -> float:
        return mask_iou(self.truth, found, self.ignored)


def run_objects(
    users: Sequence[SimulatedUser], ask: Callable[[Sequence[tuple[int, Sequence[Click]]]], Sequence[ClickedMask]]
) -> list[ObjectRun]:
    """All users click in turn, so that a model can answer the same click of many objects together.

    Args:
        ask: The answers to some objects, given as (index of the user, all clicks so far).
    """
    while active := [index for index, user in enumerate(users) if user.click()]:
        answers = ask([(index, tuple(users[index].clicks)) for index in active])
        for index, answer in zip(active, answers, strict=True):
            users[index].see(answer)
    return [user.run() for user in users]
