"""`ClickSession`: the objects of one image, from prompts, clicks and boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Unpack, get_args

import numpy as np
import torch

from sam3lora.config.post_processing import PostProcessing, PostProcessingOptions
from sam3lora.engine.adapter_pool import ClickPlace
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.interaction import Interaction, Seed, SeedKind
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MaskCleaning
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.detections import Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.errors import UserError
from sam3lora.inference.clicks.coco import coco_of
from sam3lora.inference.clicks.result import ClickResult, Found

_KEYS = count()


class ClickSession:
    """Objects of one image; `Predictor.interact` makes it. The image passes the vision tower once.

        session = predictor.interact("image.jpg")
        found = session.detect("pothole")
        session.refine(found[0], clicks=[(120, 80, 1), (40, 60, 0)])
        new = session.click([(300, 200)], label="pothole")
        new.add(310, 190, 0)
        session.to_coco()

    Args:
        finding: The engine that answers prompts, and the slot of its adapter there, None for the base.
        clicking: What answers clicks: `AdapterPool.place_clicks`.
        post: How detections are chosen.
        file_name: Of the image, for exports.
        start_from: What of a found object goes with the first clicks on it: its mask, its box, or both.
        cleaning: Of the masks that clicks and boxes make.

    Attributes:
        objects: All objects, in the order in which they came.

    Raises:
        UserError: The base has no click head, or an option is unknown.
    """

    def __init__(
        self,
        finding: tuple[Engine, int | None],
        clicking: ClickPlace,
        image_HW3: np.ndarray,
        *,
        post: PostProcessing,
        file_name: str = "image",
        start_from: SeedKind = "both",
        cleaning: MaskCleaning = AS_IT_IS,
    ) -> None:
        if start_from not in get_args(SeedKind):
            raise UserError(f"start_from must be one of {', '.join(get_args(SeedKind))}, got {start_from!r}")
        clicking.engine.enable_clicks()
        self.image_HW3 = image_HW3
        self.file_name = file_name
        self.objects: list[ClickResult] = []
        self._finder, self._slot = finding
        self._clicking, self._post, self._start_from = clicking, post, start_from
        self._cleaning = cleaning
        self._presence: dict[str, float] = {}
        image = clicking.engine.prepare_image(image_HW3, f"session {next(_KEYS)}")
        # Kept here and not only in the engine's cache, which may be small or none.
        to_find, to_click = (image, self._slot), (image, clicking.slot)
        if self._finder is clicking.engine:
            self._prompted, self._clicked = self._finder.encode_ahead([to_find, to_click])
        else:
            (self._prompted,) = self._finder.encode_ahead([to_find])
            (self._clicked,) = clicking.engine.encode_ahead([to_click])

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self._prompted.size_hw

    def detect(self, prompt: str, **post: Unpack[PostProcessingOptions]) -> list[ClickResult]:
        """The objects that a prompt finds, by descending score, labelled with the prompt.

        Asked again, for example with a lower threshold, it replaces what it found before and nobody corrected.

        Args:
            post: Fields of `PostProcessing`, such as `threshold=0.3`.

        Raises:
            UserError: The prompt is empty or too long, or a field is out of range.
        """
        asked = PromptedImage(self._prompted, (prompt,), (), self._slot, self._post.changed(**post))
        (found,) = self._finder.detect_small([asked])
        if isinstance(found, Exception):
            raise found
        detections = found[0].at_full_size(keep_logits=True)
        self._presence[prompt] = detections.presence
        self.objects = [
            one for one in self.objects if one.found is None or one.found.prompt != prompt or one.is_corrected
        ]
        results = [self._seeded(detections, row) for row in range(len(detections))]
        self.objects += results
        return results

    def refine(
        self,
        found: ClickResult,
        clicks: Iterable[Click | Sequence[float]] = (),
        box_xyxy: Sequence[float] | None = None,
    ) -> ClickResult:
        """Correct an object that `detect` found, by clicks (x, y, label), a box, or both as one step. Returns it.

        Raises:
            UserError: It is no object that `detect` of this session found, nothing is given, or something is outside of
                the image.
        """
        if not isinstance(found, ClickResult) or found.found is None or not self._has(found):
            raise UserError(
                "refine takes an object that detect of this session has returned; an object of its own is changed by "
                f"its add, got {found!r}"
            )
        return found.prompt(clicks, box_xyxy)

    def click(
        self,
        clicks: Iterable[Click | Sequence[float]],
        *,
        box_xyxy: Sequence[float] | None = None,
        label: str | None = None,
    ) -> ClickResult:
        """A new object, shown by clicks (x, y, label).

        Raises:
            UserError: There is neither a click nor a box, one is outside of the image, all clicks say what does not
                belong to the object, or the label is empty.
        """
        if label is not None:
            _check_label(label)
        state = Interaction(self.size_hw, self._clicking.engine.resolution)
        result = ClickResult(state, self._ask, label, cleaning=self._cleaning)
        result.prompt(clicks, box_xyxy)
        self.objects.append(result)
        return result

    def box(self, box_xyxy: Sequence[float], *, label: str | None = None) -> ClickResult:
        """A new object, shown by a box x0 y0 x1 y1 around it.

        Raises:
            UserError: The box has no area, or is not inside the image.
        """
        return self.click((), box_xyxy=box_xyxy, label=label)

    def label(self, result: ClickResult, label: str) -> None:
        """Say what an object is.

        Raises:
            UserError: The label is empty, or the object is not of this session.
        """
        self._check_own(result)
        _check_label(label)
        result.label = label

    def remove(self, result: ClickResult) -> None:
        """Take an object out of the session.

        Raises:
            UserError: It is not in it.
        """
        self._check_own(result)
        self.objects = [one for one in self.objects if one is not result]

    def results(self) -> list[Detections]:
        """For each label, in the order in which they came, its objects that have a mask, as `Predictor.predict`.

        Objects without a label stand under "object". A label whose objects have no mask has no detection.
        """
        of_label: dict[str, list[ClickResult]] = {prompt: [] for prompt in self._presence}
        for one in self.objects:
            of_label.setdefault(one.label or "object", []).extend([one] if one.area_px else [])
        return [self._detections(label, objects) for label, objects in of_label.items()]

    def draw(self, path: str | Path | None = None, **show: bool) -> np.ndarray:
        """Draw all objects over the image, and write the picture if there is a path; see `draw_results`.

        Raises:
            UserError: There is no object yet, or the file cannot be written.
        """
        from sam3lora.inference.result_pictures import draw_results, write_picture

        results = self.results()
        if not results:
            raise UserError("nothing to draw: detect or click first")
        picture_HW3 = draw_results(results, **show)
        if path is not None:
            write_picture(path, picture_HW3)
        return picture_HW3

    def to_coco(self, file_name: str | None = None) -> dict[str, Any]:
        """All objects as a COCO file of this image; see `coco_of`.

        Args:
            file_name: Of the image; None takes the name of the file that it was read from, or "image".

        Raises:
            UserError: An object has no label, or no mask.
        """
        return coco_of(self.objects, self.file_name if file_name is None else file_name, self.size_hw)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _ask(self, prompt: ClickPrompt) -> ClickAnswer:
        engine, slot, click_slot = self._clicking
        (answer,) = engine.click([ClickedObject(self._clicked, prompt, slot, click_slot=click_slot)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _seeded(self, detections: Detections, row: int) -> ClickResult:
        assert detections.mask_logits_NHW is not None
        assert detections.rles is not None
        x0, y0, x1, y1 = detections.boxes_xyxy[row].tolist()
        box_xyxy = (x0, y0, x1, y1)
        seed = Seed(torch.from_numpy(detections.mask_logits_NHW[row]), box_xyxy, self._start_from)
        found = Found(detections.prompt, float(detections.scores[row]), box_xyxy, detections.rles[row])
        state = Interaction(self.size_hw, self._clicking.engine.resolution, seed)
        return ClickResult(state, self._ask, detections.prompt, found, self._cleaning)

    def _detections(self, label: str, objects: Sequence[ClickResult]) -> Detections:
        by_score = sorted(objects, key=lambda one: -one.score)
        seen = [one.object_score or 0.0 for one in by_score]
        return Detections(
            label,
            self._presence.get(label, max(seen, default=0.0)),
            self.size_hw,
            np.array([one.score for one in by_score], dtype=np.float32),
            np.array([one.box_xyxy for one in by_score], dtype=np.float32).reshape(-1, 4),
            [one.rle for one in by_score],
            num_before_nms=len(by_score),
            image_HW3=self.image_HW3,
        )

    def _has(self, result: ClickResult) -> bool:
        return any(one is result for one in self.objects)

    def _check_own(self, result: ClickResult) -> None:
        if not self._has(result):
            raise UserError(f"this session has no such object: {result!r}")


def _check_label(label: str) -> None:
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"the label of an object is text that says what it is, for example 'pothole', got {label!r}")
