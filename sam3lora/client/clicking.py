"""`ClickSession`: clicks on one object of an uploaded image after the other, with the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sam3lora.client.calls import ShownObject
from sam3lora.client.errors import NotFound
from sam3lora.client.image_files import UploadedImage
from sam3lora.client.refine_results import RefinedMask, RefinedObject
from sam3lora.client.segment_results import PromptResult, Rle


@dataclass(frozen=True)
class _State:
    """Of an object: what shows it, what it started from, and the answer."""

    clicks: tuple[tuple[float, ...], ...] = ()
    box: tuple[float, ...] | None = None
    started_id: str | None = None
    started_rle: Rle | None = None
    answer: RefinedMask | None = None


class ClickSession:
    """Clicks on an image. Each call sends all clicks on the object, and the mask before.

        with Client("http://127.0.0.1:8000") as client:
            session = client.interact("photo.jpg")
            session.click(300, 200)
            found = session.click(340, 210, 0)
            found.mask
            session.undo()

    `click` and `box` go on with the object; `start` begins another one, or a detection that `Client.segment` found.

    Attributes:
        image: What the clicks are about.
    """

    def __init__(self, image: UploadedImage, ask: Callable[[ShownObject], RefinedObject]) -> None:
        self.image = image
        self._ask = ask
        self._state = _State()
        self._past: list[_State] = []

    @property
    def answer(self) -> RefinedMask | None:
        """The mask so far; None before the first click or box."""
        return self._state.answer

    def start(self, found: PromptResult | None = None, row: int = 0) -> None:
        """Begin another object: a new one, or a detection of a `segment` call about the same image.

        Its box and its mask then go with the first click: as the model made it, if `segment` was called with
        `keep_masks=True`.

        Raises:
            IndexError: There is no such detection.
            ValueError: It came without a mask.
        """
        self._past = []
        self._state = _State()
        if found is None:
            return
        if not 0 <= row < found.num_detections:
            raise IndexError(f"expected one of {found.num_detections} detections, counted from 0, got {row}")
        mask_id = found.mask_ids[row] if found.mask_ids else None
        rle = found.rles[row] if found.mask_format == "rle" else None
        if mask_id is None and rle is None:
            raise ValueError(
                'the detection has no mask to start from: call segment with keep_masks=True or masks="rle"'
            )
        self._state = _State((), tuple(found.boxes_xyxy[row].tolist()), mask_id, rle)

    def click(self, x: float, y: float, label: int = 1) -> RefinedObject:
        """The mask with one more click: label 1 belongs to the object, 0 does not."""
        return self._asked(replace(self._state, clicks=(*self._state.clicks, (x, y, label))))

    def box(self, xyxy: Iterable[float]) -> RefinedObject:
        """The mask with a box around the object, in the place of an earlier one."""
        return self._asked(replace(self._state, box=tuple(xyxy)))

    def choose(self, alternative: int) -> RefinedMask:
        """Go on with one of the last answer's alternatives.

        Raises:
            IndexError: There is no such alternative.
        """
        answer = self._state.answer
        others: Sequence[RefinedMask] = answer.alternatives if isinstance(answer, RefinedObject) else ()
        if not 0 <= alternative < len(others):
            raise IndexError(f"expected one of {len(others)} alternatives, counted from 0, got {alternative}")
        self._past.append(self._state)
        self._state = replace(self._state, answer=others[alternative])
        return others[alternative]

    def undo(self) -> RefinedMask | None:
        """The mask before the last click, box or choice; None if there was none.

        Raises:
            ValueError: There is nothing to undo.
        """
        if not self._past:
            raise ValueError("nothing to undo: there is no click and no box")
        self._state = self._past.pop()
        return self._state.answer

    def _asked(self, state: _State) -> RefinedObject:
        answer = self._ask_from(state)
        self._past.append(self._state)
        self._state = replace(state, answer=answer)
        return answer

    def _ask_from(self, state: _State) -> RefinedObject:
        """From the mask so far; where the service no longer keeps it, from its run-length code, if it came as one."""
        before = state.answer
        mask_id = state.started_id if before is None else before.mask_id
        rle = state.started_rle if before is None else before.rle if before.mask_format == "rle" else None
        shown: ShownObject = {"clicks": state.clicks, "box": state.box}
        if mask_id is not None:
            try:
                return self._ask({**shown, "mask": mask_id})
            except NotFound as error:
                if error.type != "mask_not_found" or rle is None:
                    raise
        return self._ask({**shown, "mask": rle})
