"""Simulated users of models that answer in a known way: perfect, empty, improving, too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sam3lora.data.rle import encode_rle
from sam3lora.evaluation.clicks.simulated_user import (
    MAX_CLICKS,
    ClickedMask,
    ObjectRun,
    SimulatedUser,
    run_objects,
)

SQUARE = np.zeros((12, 12), dtype=bool)
SQUARE[2:9, 3:10] = True


def user_of(truth_HW: np.ndarray, max_clicks: int = MAX_CLICKS, **masks: np.ndarray) -> SimulatedUser:
    return SimulatedUser(encode_rle(truth_HW), max_clicks=max_clicks, **{n: encode_rle(m) for n, m in masks.items()})


def answered(mask_HW: np.ndarray, choices: Sequence[np.ndarray] = (), score: float | None = None) -> ClickedMask:
    return ClickedMask(encode_rle(mask_HW), [encode_rle(one) for one in choices], score)


def run_object(truth_HW: np.ndarray, answer: Callable[..., ClickedMask], **options) -> ObjectRun:
    """Of a user alone; `answer` gets all clicks so far."""
    [run] = run_objects([user_of(truth_HW, **options)], lambda asked: [answer(clicks) for _, clicks in asked])
    return run


def perfect(_clicks):
    return answered(SQUARE)


def empty(_clicks):
    return answered(np.zeros_like(SQUARE))


def columns(clicks):
    """A column of the square more for each click."""
    mask = SQUARE.copy()
    mask[:, 3 + len(clicks) :] = False
    return answered(mask)


def test_a_perfect_model_takes_one_click():
    run = run_object(SQUARE, perfect)
    assert [(click.x, click.y, click.label) for click in run.clicks] == [(6, 5, 1)]
    # nothing is left to click on, so that the mask stays as it is
    assert run.ious.tolist() == [0] + [1] * 20


def test_an_empty_answer_is_clicked_on_to_the_end():
    run = run_object(SQUARE, empty)
    assert run.ious.tolist() == [0] * 21
    assert len({(click.x, click.y) for click in run.clicks}) == 20
    assert all(SQUARE[click.y, click.x] and click.label == 1 for click in run.clicks)


def test_everything_as_answer_is_clicked_out():
    run = run_object(SQUARE, lambda clicks: answered(np.ones_like(SQUARE)), max_clicks=3)
    assert [click.label for click in run.clicks] == [1, 0, 0]
    assert not any(SQUARE[click.y, click.x] for click in run.clicks[1:])
    assert run.ious.tolist() == [0] + [49 / 144] * 3


def test_iou_after_each_click():
    run = run_object(SQUARE, columns, max_clicks=4)
    np.testing.assert_allclose(run.ious, [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7])
    # the model is given all clicks so far
    seen = []
    run_object(SQUARE, lambda clicks: seen.append(clicks) or columns(clicks), max_clicks=3)
    assert [len(clicks) for clicks in seen] == [1, 2, 3]
    assert seen[2][:2] == seen[1]


def test_starting_from_a_found_mask():
    # right already: no click at all
    run = run_object(SQUARE, empty, found=SQUARE)
    assert run.clicks == ()
    assert run.ious.tolist() == [1] * 21
    assert math.isnan(run.oracle_iou)
    # too large: the first click takes away
    large = np.zeros_like(SQUARE)
    large[2:, 3:] = True
    run = run_object(SQUARE, perfect, found=large)
    assert [click.label for click in run.clicks] == [0]
    assert run.ious[0] == 49 / 90


def test_ignored_pixels_count_nowhere():
    crowd = np.zeros_like(SQUARE)
    crowd[:, 8:] = True
    found = SQUARE | crowd
    run = run_object(SQUARE, lambda clicks: answered(found), ignored=crowd)
    assert len(run.clicks) == 1
    assert run.ious[1] == 1


def test_oracle_is_the_best_mask_of_the_first_click():
    half = SQUARE.copy()
    half[5:] = False

    def three(clicks):
        # a bad choice with the first click; that all masks are right with the second comes too late
        others = np.stack([half, half & False, SQUARE & (np.arange(12) < 8)])
        return answered(half, others if len(clicks) == 1 else np.stack([SQUARE] * 3), score=0.9)

    run = run_object(SQUARE, three, max_clicks=3)
    assert run.ious[1] == 3 / 7
    assert run.oracle_iou == 5 / 7
    assert run.score_error == pytest.approx(0.9 - 3 / 7)
    # without a choice the oracle is the mask itself, and no error is known without an expectation
    run = run_object(SQUARE, columns, max_clicks=3)
    assert run.oracle_iou == 1 / 7
    assert math.isnan(run.score_error)


def test_objects_together_are_as_one_by_one():
    other = np.rot90(SQUARE).copy()
    other[0] = True
    asked = []

    def ask(objects):
        asked.append([index for index, _ in objects])
        return [columns(clicks) if index else perfect(clicks) for index, clicks in objects]

    together = run_objects([user_of(truth, max_clicks=4) for truth in (SQUARE, other)], ask)
    # the first object is right after one click, and is not asked about again
    assert asked == [[0, 1], [1], [1], [1]]
    for run, truth, model in zip(together, (SQUARE, other), (perfect, columns)):
        alone = run_object(truth, model, max_clicks=4)
        assert run.clicks == alone.clicks
        np.testing.assert_array_equal(run.ious, alone.ious)
    assert run_objects([], ask) == []


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"masks of one size .*, got \[12, 12\] and \[3, 3\]"):
        run_object(SQUARE, lambda clicks: answered(np.zeros((3, 3), dtype=bool)))
