"""`Interaction`: the clicks on one object so far, what to ask next, and the way back. It holds no model.

The rules are those of SAM 2's predictor, https://github.com/facebookresearch/sam2 :

- A single click alone asks for three masks, of which the one with the highest score is taken. Anything more is clear
  enough for one mask.
- Every prompt repeats all clicks and the box, with the logits of the mask taken before.
- A found object may start it (`Seed`). From the second answer on, the head's own logits take the place of the seed's.

    now = Interaction((480, 640), side=1008)
    now = now.add([Click(120, 80)])
    now = now.answered(ask(now.prompt()))       # and so on with now.add
    now = now.undo()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor

from sam3lora.engine.clicks.click import BoxXyxy, Click, checked_box, checked_clicks, refuse_only_outside
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.errors import UserError

SeedKind = Literal["mask", "box", "both"]


@dataclass(frozen=True, eq=False)
class Seed:
    """A found object to correct.

    Attributes:
        mask_mm: Logits of its mask at the head's low resolution.
        box_xyxy: Its box in pixels of the image.
        kind: What of it goes with the first clicks.

    Raises:
        UserError: Another kind.
    """

    mask_mm: Tensor = field(repr=False)
    box_xyxy: BoxXyxy
    kind: SeedKind = "both"

    def __post_init__(self) -> None:
        if self.kind not in get_args(SeedKind):
            raise UserError(f"expected a seed of {', '.join(get_args(SeedKind))}, got {self.kind!r}")


@dataclass(frozen=True, eq=False)
class Interaction:
    """A state of one interaction; every method returns another state and leaves this one as it is.

    Attributes:
        size_hw: Size of the image in pixels.
        side: Side of the model's square input in pixels.
        seed: The found object that it starts from.
        clicks: All clicks so far.
        box_xyxy: The user's box in pixels of the image.
        answer: The head's answer to the clicks and the box, None before it is asked.
        before: The state before the last prompt.

    Raises:
        UserError: A click or the box is not inside the image.
    """

    size_hw: tuple[int, int]
    side: int
    seed: Seed | None = None
    clicks: tuple[Click, ...] = ()
    box_xyxy: BoxXyxy | None = None
    answer: ClickAnswer | None = None
    before: Interaction | None = None

    def add(
        self, clicks: Iterable[Click | Sequence[float]] = (), *, box_xyxy: Sequence[float] | None = None
    ) -> Interaction:
        """With further clicks, and a box that takes the place of an earlier one. Together they are one prompt.

        Raises:
            UserError: There is nothing to add, it is not inside the image, or all of it says where the object is not.
        """
        added = checked_clicks(clicks, self.size_hw)
        if not added and box_xyxy is None:
            raise UserError("nothing to add: give a click or a box")
        if self.seed is None and box_xyxy is None and self.box_xyxy is None:
            refuse_only_outside(self.clicks + added)
        return replace(
            self,
            clicks=self.clicks + added,
            box_xyxy=self.box_xyxy if box_xyxy is None else checked_box(box_xyxy, self.size_hw),
            answer=None,
            before=self.before if self._is_asking else self,
        )

    def prompt(self) -> ClickPrompt | None:
        """What to ask the head; None with the answer, and without a click or a box, where a seed is shown as it is."""
        if not self._is_asking:
            return None
        assert self.before is not None
        mask_mm, box_xyxy = self.before.mask_mm, self.box_xyxy
        if self.seed is not None:
            if self.seed.kind == "box" and self.before.answer is None:
                mask_mm = None
            if self.seed.kind != "mask" and box_xyxy is None:
                box_xyxy = self.seed.box_xyxy
        return ClickPrompt.of(self.clicks, box_xyxy, mask_mm, size_hw=self.size_hw, side=self.side)

    def answered(self, answer: ClickAnswer) -> Interaction:
        """With the head's answer to `prompt`, or with another of its masks chosen."""
        assert self.before is not None, "nothing was asked"
        return replace(self, answer=answer)

    def undo(self) -> Interaction:
        """The state before the last prompt. Nothing of the mask that the prompt led to is kept.

        Raises:
            UserError: There was no prompt.
        """
        if self.before is None:
            raise UserError("nothing to undo: there is no click and no box")
        return self.before

    @property
    def mask_mm(self) -> Tensor | None:
        """Logits of the mask to show: the chosen one, or before any answer the seed's."""
        if self.answer is not None:
            return self.answer.mask_mm
        return None if self.seed is None else self.seed.mask_mm

    @property
    def _is_asking(self) -> bool:
        """Whether there is a prompt that has no answer yet."""
        return self.before is not None and self.answer is None
