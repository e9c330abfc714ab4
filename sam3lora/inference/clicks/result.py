"""`ClickResult`: one object of a session, its mask so far, and the clicks that change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sam3lora.data.masks import decode_mask
from sam3lora.engine.clicks.click import BoxXyxy, Click
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MaskCleaning
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.mask_codes import Rle, encode_logits, rle_area_px, rle_box_xyxy
from sam3lora.errors import UserError

Ask = Callable[[ClickPrompt], ClickAnswer]


class Alternative(NamedTuple):
    """One of the masks for a single click, and the IoU with the object that the click head expects of it."""

    rle: Rle
    score: float


class Found(NamedTuple):
    """What the detector said of an object."""

    prompt: str
    score: float
    box_xyxy: BoxXyxy
    rle: Rle


class ClickResult:
    """An object of a `ClickSession`, which makes it. All coordinates are pixels of the image.

    Attributes:
        label: What it is; None if nobody said.
        found: What the detector said of it; None for an object that a click or a box has shown.
    """

    def __init__(
        self,
        state: Interaction,
        ask: Ask,
        label: str | None = None,
        found: Found | None = None,
        cleaning: MaskCleaning = AS_IT_IS,
    ) -> None:
        self._state = state
        self._ask = ask
        self._cleaning = cleaning
        self._coded: tuple[Interaction, Rle] | None = None
        self.label = label
        self.found = found

    def __repr__(self) -> str:
        return (
            f"ClickResult(label={self.label!r}, score={self.score:.3f}, area_px={self.area_px}, clicks={self.clicks})"
        )

    # ---- what it is now -------------------------------------------------------------------------------------------

    @property
    def rle(self) -> Rle:
        """The mask as compressed COCO RLE at the image's size; without a pixel before the first click."""
        if self.found is not None and not self.is_corrected:
            return self.found.rle
        if self._coded is None or self._coded[0] is not self._state:
            self._coded = self._state, self._encode(self._state.mask_mm)
        return self._coded[1]

    @property
    def mask(self) -> np.ndarray:
        """bool (H, W) at the image's size."""
        return decode_mask(self.rle, self._state.size_hw)

    @property
    def area_px(self) -> int:
        return rle_area_px(self.rle)

    @property
    def box_xyxy(self) -> BoxXyxy:
        """Around the mask, zeros without one; the detector's own for a found object without clicks."""
        if self.found is not None and not self.is_corrected:
            return self.found.box_xyxy
        return rle_box_xyxy(self.rle)

    @property
    def score(self) -> float:
        """In [0, 1]: the IoU that the click head expects, or before any click the detector's score, or 0."""
        if self._state.answer is not None:
            return self._state.answer.score
        return 0.0 if self.found is None else self.found.score

    @property
    def object_score(self) -> float | None:
        """Probability in [0, 1] that there is an object, by the click head; None before it was asked."""
        return None if self._state.answer is None else self._state.answer.object_score

    @property
    def alternatives(self) -> list[Alternative]:
        """All masks of the last answer: three for a single click, otherwise one."""
        answer = self._state.answer
        if answer is None:
            return []
        masks = zip(answer.logits_Mmm, answer.scores, strict=True)
        return [Alternative(self._encode(mask_mm), score) for mask_mm, score in masks]

    @property
    def clicks(self) -> tuple[Click, ...]:
        return self._state.clicks

    @property
    def is_corrected(self) -> bool:
        """Whether the mask is from clicks or a box."""
        return self._state.answer is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "label": self.label,
            "score": round(self.score, 6),
            "object_score": None if self.object_score is None else round(self.object_score, 6),
            "box_xyxy": [round(value, 2) for value in self.box_xyxy],
            "area_px": self.area_px,
            "mask": self.rle,
            "clicks": [{"x": one.x, "y": one.y, "label": int(one.label)} for one in self.clicks],
            "click_box_xyxy": None if self._state.box_xyxy is None else list(self._state.box_xyxy),
            "alternatives": [{"score": round(one.score, 6), "mask": one.rle} for one in self.alternatives],
        }

    # ---- what changes it ------------------------------------------------------------------------------------------

    def add(self, x: float, y: float, label: int = 1) -> ClickResult:
        """Click on what belongs to the object (label 1) or does not (label 0). Returns itself.

        Raises:
            UserError: The click is outside of the image, or its label is another.
        """
        return self.prompt([(x, y, label)])

    def prompt(
        self, clicks: Iterable[Click | Sequence[float]] = (), box_xyxy: Sequence[float] | None = None
    ) -> ClickResult:
        """Add clicks (x, y, label) and a box, which takes the place of an earlier one, as one step. Returns itself.

        Raises:
            UserError: Nothing is given, or something is outside of the image.
        """
        state = self._state.add(clicks, box_xyxy=box_xyxy)
        prompt = state.prompt()
        assert prompt is not None, "there is something to ask"
        self._state = state.answered(self._ask(prompt))
        return self

    def choose(self, index: int) -> ClickResult:
        """Take another of the `alternatives`. Returns itself.

        Raises:
            UserError: There is no such mask.
        """
        answer = self._state.answer
        number = 0 if answer is None else len(answer.scores)
        if answer is None or index not in range(number):
            raise UserError(f"there is no alternative {index!r}: this object has {number}, counted from 0")
        self._state = self._state.answered(answer.choosing(int(index)))
        return self

    def undo(self) -> ClickResult:
        """Take the last step back. Returns itself.

        Raises:
            UserError: There was none.
        """
        self._state = self._state.undo()
        return self

    def _encode(self, mask_mm: Tensor | None) -> Rle:
        """Without a mask the code of one without a pixel."""
        logits = np.full((1, 1), -1.0) if mask_mm is None else mask_mm.float().numpy()
        size_hw = self._state.size_hw
        return encode_logits(self._cleaning.clean(logits, self._state.clicks, size_hw), size_hw)
