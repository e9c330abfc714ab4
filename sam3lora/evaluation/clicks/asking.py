"""Simulated users of one image, and what a click head answers them by the rules of an interaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MaskCleaning
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.mask_codes import Rle, encode_logits
from sam3lora.evaluation.clicks.simulated_user import ClickedMask

SHOWN_CLICKS = (1, 3, 8)
"""Numbers of clicks after which reports show a mask."""

AnswerPrompts = Callable[[Sequence[ClickPrompt]], Sequence[ClickAnswer | Exception]]
"""Answers to prompts about one image, or why there is none."""


class ImageInteractions:
    """One interaction for each user. Masks are decided at the size of the image, as those that are served.

    Args:
        ask: Prompts of one call may be of several kinds.
        starts: Interactions without a click.
        cleaning: Of the masks that users see.

    Attributes:
        shown: For each user, `SHOWN_CLICKS` -> mask after so many clicks as RLE, or after fewer if there were no more.
    """

    def __init__(self, ask: AnswerPrompts, starts: Sequence[Interaction], cleaning: MaskCleaning = AS_IT_IS) -> None:
        self._ask = ask
        self._cleaning = cleaning
        self._states = list(starts)
        self.shown: list[dict[int, Rle]] = [{} for _ in starts]

    def answer(self, asked: Sequence[tuple[int, Sequence[Click]]]) -> list[ClickedMask]:
        """For `run_objects`.

        Raises:
            Exception: What was given instead of an answer.
        """
        prompts = []
        for index, clicks in asked:
            self._states[index] = self._states[index].add(clicks[-1:])
            prompt = self._states[index].prompt()
            assert prompt is not None
            prompts.append(prompt)
        found = []
        for (index, clicks), answer in zip(asked, self._ask(prompts), strict=True):
            if isinstance(answer, Exception):
                raise answer
            self._states[index] = self._states[index].answered(answer)
            found.append(self._mask(index, len(clicks), answer))
        return found

    def _mask(self, index: int, num_clicks: int, answer: ClickAnswer) -> ClickedMask:
        size_hw, clicks = self._states[index].size_hw, self._states[index].clicks
        cleaned = (self._cleaning.clean(one, clicks, size_hw) for one in answer.logits_Mmm.float().numpy())
        rles = [encode_logits(logits_mm, size_hw) for logits_mm in cleaned]
        self.shown[index] |= {number: rles[answer.chosen] for number in SHOWN_CLICKS if num_clicks <= number}
        return ClickedMask(rles[answer.chosen], rles, answer.score)
