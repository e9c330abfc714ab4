"""The rules of an interaction: what is asked after each click, with a head that answers numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.interaction import Interaction, Seed
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt, drawn_mask_logits
from sam3lora.errors import UserError

SIZE_HW, SIDE = (50, 100), 200  # x doubles, y quadruples
BEST_OF_THREE = 1


class Head:
    """Answers masks whose logits are all the number of the call, and a tenth more for each further mask."""

    def __init__(self) -> None:
        self.asked: list[ClickPrompt] = []

    def __call__(self, prompt: ClickPrompt | None) -> ClickAnswer:
        assert prompt is not None
        self.asked.append(prompt)
        scores = (0.2, 0.9, 0.5) if prompt.multimask else (0.7,)
        logits = torch.full((len(scores), 4, 4), float(len(self.asked)))
        return ClickAnswer.of(logits + torch.arange(len(scores))[:, None, None] / 10, scores, 0.8)

    def next(self, state: Interaction, *clicks: tuple[float, ...], box_xyxy=None) -> Interaction:
        state = state.add(clicks, box_xyxy=box_xyxy)
        return state.answered(self(state.prompt()))


def logit(mask: torch.Tensor | None) -> float | None:
    """The one value of a constant mask."""
    if mask is None:
        return None
    assert mask.unique().numel() == 1
    return round(mask.flatten()[0].item(), 4)


def seed(kind="both", value=100.0):
    return Seed(torch.full((4, 4), value), (10, 5, 50, 25), kind)


def test_nothing_is_asked_without_a_prompt():
    plain = Interaction(SIZE_HW, SIDE)
    assert plain.prompt() is None
    assert plain.mask_mm is None
    # a found object is shown as it was found
    found = Interaction(SIZE_HW, SIDE, seed())
    assert found.prompt() is None
    assert logit(found.mask_mm) == 100
    for state in (plain, found):
        with pytest.raises(UserError, match="undo"):
            state.undo()
        with pytest.raises(UserError, match="nothing to add"):
            state.add()


def test_first_click_asks_for_three_masks_and_takes_the_best():
    head = Head()
    state = head.next(Interaction(SIZE_HW, SIDE), (30, 20))
    [asked] = head.asked
    np.testing.assert_array_equal(asked.points_k2, [[60, 80]])
    assert asked.points_k2.dtype == np.float32
    assert asked.labels_k.tolist() == [1]
    assert (asked.box_xyxy, asked.mask_mm, asked.multimask) == (None, None, True)
    assert (state.answer.chosen, state.answer.score, state.answer.object_score) == (BEST_OF_THREE, 0.9, 0.8)
    assert logit(state.mask_mm) == 1.1
    assert len(state.answer.logits_Mmm) == 3  # the others can still be had
    assert state.prompt() is None  # nothing is left to ask


def test_each_click_repeats_the_earlier_ones_with_the_mask_before():
    head = Head()
    state = Interaction(SIZE_HW, SIDE)
    for click in [(30, 20), (99, 49, 0), (0, 0, 1)]:
        state = head.next(state, click)
    assert [len(asked.points_k2) for asked in head.asked] == [1, 2, 3]
    np.testing.assert_array_equal(head.asked[2].points_k2, [[60, 80], [198, 196], [0, 0]])
    assert head.asked[2].labels_k.tolist() == [1, 0, 1]
    assert [logit(asked.mask_mm) for asked in head.asked] == [None, 1.1, 2]
    assert [asked.multimask for asked in head.asked] == [True, False, False]
    assert state.clicks == (Click(30, 20), Click(99, 49, 0), Click(0, 0))
    assert logit(state.mask_mm) == 3


def test_another_mask_may_be_chosen():
    head = Head()
    state = head.next(Interaction(SIZE_HW, SIDE), (30, 20))
    state = state.answered(state.answer.choosing(2))
    assert logit(state.mask_mm) == 1.2
    assert state.answer.score == 0.5
    head.next(state, (1, 1, 0))
    assert logit(head.asked[1].mask_mm) == 1.2
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="one of 3"):
            state.answer.choosing(wrong)


def test_a_box_or_two_clicks_at_once_ask_for_one_mask():
    start = Interaction(SIZE_HW, SIDE)
    box = start.add(box_xyxy=(10, 5, 50, 25)).prompt()
    np.testing.assert_array_equal(box.box_xyxy, [20, 20, 100, 100])
    assert box.points_k2.shape == (0, 2)
    both = start.add([(30, 20)], box_xyxy=(10, 5, 50, 25)).prompt()
    two = start.add([(30, 20), (40, 20)]).prompt()
    assert not any(prompt.multimask for prompt in (box, both, two))
    # prompts of different kinds do not go together, those of one kind do
    assert len({box.kind, both.kind, two.kind, start.add([(30, 20)]).prompt().kind}) == 4
    assert start.add([(1, 1), (2, 2)]).prompt().kind == two.kind
    # added in two steps before anything is asked, they are one prompt
    in_steps = start.add([(30, 20)]).add([(40, 20)])
    np.testing.assert_array_equal(in_steps.prompt().points_k2, two.points_k2)
    assert in_steps.prompt().mask_mm is None
    assert in_steps.undo() is start


def test_a_box_stays_with_its_clicks_until_another_comes():
    head = Head()
    state = head.next(Interaction(SIZE_HW, SIDE), box_xyxy=(10, 5, 50, 25))
    state = head.next(state, (30, 20))
    np.testing.assert_array_equal(head.asked[1].box_xyxy, [20, 20, 100, 100])
    assert not head.asked[1].multimask  # although it is the first click
    head.next(state, box_xyxy=(0, 0, 100, 50))
    np.testing.assert_array_equal(head.asked[2].box_xyxy, [0, 0, 200, 200])
    assert len(head.asked[2].points_k2) == 1


def test_undo_forgets_the_mask_that_the_removed_click_led_to():
    head = Head()
    start = Interaction(SIZE_HW, SIDE)
    first = head.next(start, (30, 20))
    second = head.next(first, (1, 1, 0))
    assert second.undo() is first
    assert logit(second.undo().mask_mm) == 1.1
    # the next click is asked as if the removed one had never been
    head.next(second.undo(), (2, 2, 0))
    np.testing.assert_array_equal(head.asked[2].points_k2, [[60, 80], [4, 8]])
    assert logit(head.asked[2].mask_mm) == 1.1
    # and back at the start a single click may mean several objects again
    head.next(second.undo().undo(), (5, 5))
    assert head.asked[3].multimask
    assert head.asked[3].mask_mm is None
    # a click that failed to be asked is taken back the same way
    assert first.add([(3, 3)]).undo() is first
    # states are values: the one that was undone is still there
    assert len(second.clicks) == 2


@pytest.mark.parametrize(("kind", "box", "mask"), [("both", True, 32), ("box", True, None), ("mask", False, 32)])
def test_seed_goes_with_the_first_clicks(kind, box, mask):
    # Its logits are cut at 32; from the second answer on the head's own take their place, and the box stays.
    head = Head()
    state = head.next(Interaction(SIZE_HW, SIDE, seed(kind)), (30, 20, 0))
    state = head.next(state, (40, 20))
    assert [logit(asked.mask_mm) for asked in head.asked] == [mask, 1]
    for asked in head.asked:
        assert not asked.multimask
        assert (asked.box_xyxy is not None) == box
        if box:
            np.testing.assert_array_equal(asked.box_xyxy, [20, 20, 100, 100])
    # back at the start the found mask is shown and asked with again
    start = state.undo().undo()
    assert logit(start.mask_mm) == 100
    head.next(start, (1, 1))
    assert logit(head.asked[2].mask_mm) == mask
    # a box of the user's own is better known
    np.testing.assert_array_equal(start.add(box_xyxy=(0, 0, 100, 50)).prompt().box_xyxy, [0, 0, 200, 200])


def test_negative_logits_of_a_seed_are_cut_too():
    state = Interaction(SIZE_HW, SIDE, seed(value=-1000.0)).add([(1, 1)])
    assert logit(state.prompt().mask_mm) == -32


def test_wrong_input_is_refused_and_changes_nothing():
    start = Interaction(SIZE_HW, SIDE)
    with pytest.raises(UserError, match="x=100"):
        start.add([(1, 1), (100, 10)])
    with pytest.raises(UserError, match="box"):
        start.add([(1, 1)], box_xyxy=(0, 0, 100, 51))
    assert start.clicks == ()
    with pytest.raises(UserError, match="'masks'"):
        seed("masks")


def test_drawn_masks_become_logits_of_the_head():
    mask = np.zeros((6, 4), dtype=bool)
    mask[:3] = True
    # 6 x 4 pixels to 4 x 4 cells: rows 0, 1, 2, 3 cover pixels 0-1, 1-2, 3-4, 4-5 of the height
    assert drawn_mask_logits(mask, 4).tolist() == [[10] * 4] * 2 + [[-10] * 4] * 2
    assert drawn_mask_logits(~mask, 1).item() == 0
    assert drawn_mask_logits(mask[:1], 8).eq(10).all()
    for height, width in ((37, 53), (100, 33), (5, 300), (64, 64), (1, 1)):
        drawn = np.random.default_rng(0).random((2, height, width)) < 0.3
        expected = drawn_mask_logits(torch.from_numpy(drawn), 16)
        torch.testing.assert_close(drawn_mask_logits(drawn, 16), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn_mask_logits(np.asfortranarray(drawn[1]), 16), expected[1], rtol=0, atol=1e-5)
    several = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]], dtype=torch.bool)
    assert drawn_mask_logits(several, 2, 8.0).tolist() == [[[8, 0], [-4, -8]]]
