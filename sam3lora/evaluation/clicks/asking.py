"""Simulated users of one image, and the click head that answers them by the rules of an interaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.prompt import ClickAnswer
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.mask_codes import encode_logits
from sam3lora.evaluation.clicks.simulated_user import ClickedMask

SHOWN_CLICKS = (1, 3, 8)
"""Numbers of clicks after which reports show a mask."""

AnswerClicks = Callable[[Sequence[ClickedObject]], Sequence[ClickAnswer | Exception]]
"""`Engine.click`."""


class ImageInteractions:
    """One interaction for each user. Masks are decided at the size of the image, as those that are served.

    Args:
        slot: Of the adapter that is clicked with.
        starts: Interactions without a click.

    Attributes:
        shown: For each user, `SHOWN_CLICKS` -> mask after so many clicks as RLE, or after fewer if there were no more.
    """

    def __init__(
        self, click: AnswerClicks, image: PreparedImage, slot: int | None, starts: Sequence[Interaction]
    ) -> None:
        self._click, self._image, self._slot = click, image, slot
        self._states = list(starts)
        self.shown: list[dict[int, dict[str, Any]]] = [{} for _ in starts]

    def answer(self, asked: Sequence[tuple[int, Sequence[Click]]]) -> list[ClickedMask]:
        """For `run_objects`.

        Raises:
            Exception: What the engine gave instead of an answer.
        """
        objects = []
        for index, clicks in asked:
            self._states[index] = self._states[index].add(clicks[-1:])
            prompt = self._states[index].prompt()
            assert prompt is not None
            objects.append(ClickedObject(self._image, prompt, self._slot))
        found = []
        for (index, clicks), answer in zip(asked, self._click(objects), strict=True):
            if isinstance(answer, Exception):
                raise answer
            self._states[index] = self._states[index].answered(answer)
            found.append(self._mask(index, len(clicks), answer))
        return found

    def _mask(self, index: int, num_clicks: int, answer: ClickAnswer) -> ClickedMask:
        rles = [encode_logits(logits_mm, self._image.size_hw) for logits_mm in answer.logits_Mmm.float().numpy()]
        self.shown[index] |= {number: rles[answer.chosen] for number in SHOWN_CLICKS if num_clicks <= number}
        masks_MHW = np.stack([coco_mask.decode(rle) for rle in rles]).astype(bool)
        return ClickedMask(masks_MHW[answer.chosen], masks_MHW, answer.score)
