"""Prompts on the engine: prompts of several images under several adapters, answered together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import FeatureSource, SlotAdapter
from sam3lora.engine.forward import Forward, MixedForward, Row
from sam3lora.engine.selection import NotFiniteError, SmallDetections, Wanted
from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import CLICKS, DENSE
from sam3lora.model.tokenization import PromptError

BOXES_ALONE_PROMPT = "visual"
"""SAM 3 was trained to read this text beside boxes that have no text of their own."""

PROMPTS_COUNTED = ("forwards", "rows")

_OTHER_TASKS = {
    DENSE: "this adapter labels each pixel and finds no objects of prompts",
    CLICKS: "this adapter answers clicks and finds no objects of prompts",
}


@dataclass(frozen=True)
class PromptedImage:
    """One image from `Engine.prepare_image` and what is wanted of it by the adapter in a slot, or by the base (None).

    Prompts have at most 32 tokens, and none are needed if there are boxes, which go with every prompt. `lowest_score`
    is explained at `selection.Wanted`.
    """

    image: PreparedImage
    prompts: tuple[str, ...]
    boxes: tuple[BoxPrompt, ...] = ()
    slot: int | None = None
    post: PostProcessing = field(default_factory=PostProcessing)
    masks: bool = True
    lowest_score: float | None = None

    @property
    def num_rows(self) -> int:
        return max(1, len(self.prompts))


class ObjectFinder:
    """Finds the objects of prompts. The model thread alone calls what is here, but for `check_prompts`.

    Args:
        forward: Runs batches.
        plain: Runs the semantic head.
        features: Has the caches.
        adapters: By slot, as the engine holds them.
        max_rows: (image, prompt) pairs in one forward pass.
    """

    def __init__(
        self,
        forward: Forward,
        plain: MixedForward,
        features: FeatureSource,
        adapters: Mapping[int | None, SlotAdapter],
        *,
        max_rows: int,
    ) -> None:
        self._forward = forward
        self._plain = plain
        self._features = features
        self._adapters = adapters
        self._max_rows = max_rows
        self.counts: Counter[str] = Counter()

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raise PromptError for a prompt that is empty or has more than 32 tokens."""
        for number, prompt in enumerate(prompts):
            try:
                self._features.token_ids(prompt)
            except PromptError as error:
                error.number = number
                raise

    def problem(self, image: PromptedImage) -> Exception | None:
        """Why an image cannot be asked; None if it can."""
        if image.slot not in self._adapters:
            return LookupError(f"slot {image.slot} holds no adapter")
        if (task := self._adapters[image.slot].task) in _OTHER_TASKS:
            return UserError(_OTHER_TASKS[task])
        if not image.prompts and not image.boxes:
            return UserError("no prompts: name what to look for, for example prompts=['crack'], or give boxes")
        try:
            self.check_prompts(image.prompts)
            for box in image.boxes:
                relative_cxcywh(box, image.image.size_hw)
        except UserError as error:
            return error
        return None

    def detect(self, images: Sequence[PromptedImage]) -> list[list[Detections]]:
        """`Engine.detect`."""
        self._refuse(images)
        found = (small.at_full_size() for small in self.run(images))
        return [list(islice(found, image.num_rows)) for image in images]

    def detect_small(self, images: Sequence[PromptedImage]) -> list[list[SmallDetections] | Exception]:
        """`Engine.detect_small`."""
        results: list[list[SmallDetections] | Exception | None] = [self.problem(image) for image in images]
        possible = [number for number, problem in enumerate(results) if problem is None]
        chosen = [images[number] for number in possible]
        found: Sequence[list[SmallDetections] | Exception]
        try:
            rows = self.run(chosen)
            found = [_finite(list(islice(rows, image.num_rows))) for image in chosen]
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            if len(possible) == 1:
                found = [error]
            else:  # find the image that fails
                found = [one for image in chosen for one in self.detect_small([image])]
        for number, result in zip(possible, found, strict=True):
            results[number] = result
        return [result for result in results if result is not None]

    def semantic_logits(self, images: Sequence[PromptedImage]) -> list[list[np.ndarray]]:
        """`Engine.semantic_logits`."""
        self._refuse(images)
        found = (logits.float().cpu().numpy() for logits in self._plain.semantic(self._rows(images), self._max_rows))
        logits = [list(islice(found, image.num_rows)) for image in images]
        if not all(np.isfinite(one).all() for of_image in logits for one in of_image):
            raise NotFiniteError("the semantic outputs are NaN or infinite: the training of the adapter diverged")
        return logits

    def run(self, images: Sequence[PromptedImage]) -> Iterator[SmallDetections]:
        """The detections of all prompts of all images, which have no problem, one after the other."""
        rows = self._rows(images)
        self.counts["forwards"] += -(-len(rows) // self._max_rows)
        self.counts["rows"] += len(rows)
        return self._forward.detect(rows, self._max_rows)

    def _refuse(self, images: Sequence[PromptedImage]) -> None:
        for image in images:
            if problem := self.problem(image):
                raise problem

    def _rows(self, images: Sequence[PromptedImage]) -> list[Row]:
        """A row for each prompt of each image, with the features that it needs."""
        asked = [image if image.prompts else replace(image, prompts=(BOXES_ALONE_PROMPT,)) for image in images]
        adapters = [self._adapters[image.slot] for image in asked]
        for image in asked:
            if image.image.features is None:
                self._features.images.keep_image(image.image)
        vision = self._features.vision([(image.image, adapter) for image, adapter in zip(asked, adapters, strict=True)])
        text = self._features.text(
            [(prompt, adapter) for image, adapter in zip(asked, adapters, strict=True) for prompt in image.prompts]
        )
        rows = []
        for image, adapter in zip(asked, adapters, strict=True):
            size_hw = image.image.size_hw
            boxes = tuple((relative_cxcywh(box, size_hw), box.label) for box in image.boxes)
            of_image = vision[image.image.key, adapter.of("vision_encoder").version]
            maker = adapter.of("text_encoder").version
            for prompt in image.prompts:
                wanted = Wanted(prompt, size_hw, image.post, image.masks, image.lowest_score)
                rows.append(Row(of_image, text[prompt, maker], wanted, image.slot, boxes, adapter.geometry_cls))
        return rows


def _finite(found: list[SmallDetections]) -> list[SmallDetections] | NotFiniteError:
    if all(one.is_finite for one in found):
        return found
    return NotFiniteError("the outputs for this image are NaN or infinite")


def relative_cxcywh(box: BoxPrompt, size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """Centre and size of a box in [0, 1] of the image's sides.

    Raises:
        UserError: It is not within the image, has no area, or its label is neither 0 nor 1.
    """
    height, width = size_hw
    x0, y0, x1, y1 = box.xyxy
    if box.label not in (0, 1):
        raise UserError(f"a box has label 1 (this is meant) or 0 (this is not), got {box.label}")
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"box {list(box.xyxy)} must be x0 y0 x1 y1 in pixels with x0 < x1 <= {width}, y0 < y1 <= {height}"
        )
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
