"""A simulated user, who clicks into the middle of the largest error, and what comes of the clicks on one object.

Shapes: `H` `W` pixels of the image, `M` masks to choose from, `K` clicks at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sam3lora.engine.clicks.click import Click
from sam3lora.evaluation.clicks.next_click import mask_iou, next_click

MAX_CLICKS = 20
"""Clicks at most for one object."""


@dataclass(frozen=True, eq=False)
class ClickedMask:
    """What a model answers to the clicks on an object so far.

    Attributes:
        mask_HW: bool, the mask at the image's size.
        choices_MHW: All masks that it chose from, where there was more than one.
        score: The IoU that the model expects of its mask, if it says so.
    """

    mask_HW: np.ndarray
    choices_MHW: np.ndarray | None = None
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
        truth_HW: bool, the object.
        ignored_HW: bool, see `next_click`.
        found_HW: bool, the mask that the user starts from, such as a detector's; None is an empty one.
    """

    def __init__(
        self,
        truth_HW: np.ndarray,
        ignored_HW: np.ndarray | None = None,
        found_HW: np.ndarray | None = None,
        max_clicks: int = MAX_CLICKS,
    ) -> None:
        self.truth_HW = truth_HW
        self.ignored_HW = ignored_HW
        self.found_HW = np.zeros_like(truth_HW) if found_HW is None else found_HW
        self.max_clicks = max_clicks
        self.clicks: list[Click] = []
        self._ious = [self._iou(self.found_HW)]
        self._oracle_iou = self._score_error = math.nan

    def click(self) -> bool:
        """Make the next click, if there is one to make."""
        if len(self.clicks) == self.max_clicks:
            return False
        click = next_click(self.truth_HW, self.found_HW, self.clicks, self.ignored_HW)
        if click is not None:
            self.clicks.append(click)
        return click is not None

    def see(self, answer: ClickedMask) -> None:
        """Look at the answer to the clicks.

        Raises:
            ValueError: It is not a bool mask of the image's size.
        """
        if answer.mask_HW.shape != self.truth_HW.shape or answer.mask_HW.dtype != bool:
            raise ValueError(
                f"expected a bool mask of {self.truth_HW.shape}, got {answer.mask_HW.dtype} {answer.mask_HW.shape}"
            )
        self.found_HW = answer.mask_HW
        iou = self._iou(answer.mask_HW)
        self._ious.append(iou)
        if len(self.clicks) == 1:
            choices = () if answer.choices_MHW is None else tuple(answer.choices_MHW)
            self._oracle_iou = max([iou, *map(self._iou, choices)])
            self._score_error = math.nan if answer.score is None else abs(answer.score - iou)

    def run(self) -> ObjectRun:
        """What came of it so far."""
        ious = np.full(self.max_clicks + 1, self._ious[-1])
        ious[: len(self._ious)] = self._ious
        return ObjectRun(ious, tuple(self.clicks), self._oracle_iou, self._score_error)

    def _iou(self, found_HW: np.ndarray) -> float:
        return mask_iou(self.truth_HW, found_HW, self.ignored_HW)


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
