"""Clicks on the engine: objects of several images and adapters, decoded together.

The click head has a neck, a prompt encoder and a mask decoder of its own. It reads the tokens of the vision trunk. Once
clicks are enabled, a vision pass keeps them beside the features of the detector, so an image is encoded once for both.
Of an adapter that finds objects the head sees what changes the trunk, and nothing else. Click adapters change the mask
decoder. They are in a bank like that of the detector, so features of images serve all of them, and objects under
several of them are decoded together.

Shapes: `N` objects decoded together, `k` clicks of each, `M` masks of an object, `m` side of low-resolution masks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sam3lora.engine.clicks.answers import decode_prompts, groups_of_kind
from sam3lora.engine.clicks.click import Click, ClicksVision
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import BASE, FeatureSource, SlotAdapter
from sam3lora.engine.forward import Forward
from sam3lora.engine.selection import NotFiniteError
from sam3lora.engine.transfers import download
from sam3lora.errors import UserError
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.metadata import DETECTION
from sam3lora.model.adapter.weights import AdapterWeights, fingerprint_once
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.clicks.weights import ClickWeights, NamedAsInVideo
from sam3lora.model.loading import LoadedBase
from sam3lora.model.precision import store_matrices_in

if TYPE_CHECKING:
    from sam3lora.model.clicks.head import ClickFeatures, ClickHead

CLICKS_COUNTED = ("objects_clicked", "click_decodes")


@dataclass(frozen=True)
class ClickedObject:
    """An object of an image from `Engine.prepare_image`, and what the click head is asked about it.

    Attributes:
        slot: The adapter in this slot, or the base (None).
        vision: With "base" the adapter takes no part, and the image may need a second vision pass. Features that the
            image brings with it are used as they are.
        click_slot: The click adapter in this slot, or the base's click head (None).
    """

    image: PreparedImage
    prompt: ClickPrompt
    slot: int | None = None
    vision: ClicksVision = "adapter"
    click_slot: int | None = None


class ClickDecoder:
    """The click head of a base, loaded when it is first needed, and click adapters in slots.

    The model thread alone calls what is here, but for `load_head`.

    Args:
        forward: Runs the trunk, and is told to keep its tokens.
        features: Has the caches, and the lock of the vision tower.
        adapters: By slot, as the engine holds them.
        half: Whether the head runs under autocast to bfloat16, and stores its matrices so.
    """

    def __init__(
        self,
        base: LoadedBase,
        forward: Forward,
        features: FeatureSource,
        adapters: Mapping[int | None, SlotAdapter],
        *,
        num_slots: int,
        half: bool,
    ) -> None:
        self._base = base
        self._forward = forward
        self._features = features
        self._adapters = adapters
        self._num_slots = num_slots
        self._half = half
        self._loaded: tuple[ClickHead, AdapterBank] | None = None
        self._loading = threading.Lock()
        self._keeps_trunk = False
        self._origins: dict[int, ClickOrigin] = {}
        self.counts: Counter[str] = Counter()

    def load_head(self) -> ClickHead:
        """The base's click head, from any thread.

        Raises:
            UserError: The base has no tracker, or a damaged one.
        """
        return self._load()[0]

    def _load(self) -> tuple[ClickHead, AdapterBank]:
        with self._loading:
            if self._loaded is None:
                from sam3lora.model.clicks.loading import (
                    load_click_head,
                )  # with parts of transformers that others leave out

                head = load_click_head(self._base)
                fingerprint_once(head)
                if self._half:
                    store_matrices_in(head, torch.bfloat16)
                self._loaded = head, AdapterBank(NamedAsInVideo(head.mask_decoder), self._num_slots)
            return self._loaded

    def enable(self) -> ClickHead:
        """Load the click head, and keep the trunk's tokens of images that are encoded from now on.

        Raises:
            UserError: The base has no tracker, or a damaged one.
        """
        head = self.load_head()
        if not self._keeps_trunk:
            with self._features.vision_lock:
                self._forward.keep_trunk()
            self._keeps_trunk = True
        return head

    # ---- click adapters -------------------------------------------------------------------------------------------

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Keep a click adapter; a slot of another adapter has nothing here."""
        self.clear(slot)
        if isinstance(weights, ClickWeights):
            self._load()[1].put(slot, replace(weights, modules=weights.updates))
            self._origins[slot] = weights.origin

    def clear(self, slot: int) -> None:
        if self._origins.pop(slot, None) is not None:
            self._load()[1].clear(slot)

    def check(self, slot: int | None, click_slot: int | None) -> None:
        """Raise UserError if a click adapter was not trained on the trunk that clicks see, that of `slot`."""
        if click_slot is not None and (fault := self._origins[click_slot].trunk_fault(self._adapters[slot].trunk)):
            raise UserError(f"the click adapter {fault}")

    def is_finite(self, image: PreparedImage, adapter: SlotAdapter) -> bool:
        """Whether a click adapter's answer for an image with features is, which is asked without counting."""
        side = self.enable().input_side
        prompt = ClickPrompt.of([Click(side // 2, side // 2)], size_hw=(side, side), side=side)
        asked = ClickedObject(image, prompt, click_slot=adapter.slot)
        (answer,) = self._decode([asked], self._features_of([asked], ()))
        return isinstance(answer, ClickAnswer)

    # ---- answers --------------------------------------------------------------------------------------------------

    def maker(self, asked: ClickedObject) -> SlotAdapter | None:
        """The adapter, or the base, whose vision trunk an object is seen by; None if its slot has none that finds."""
        adapter = self._adapters.get(asked.slot)
        if adapter is None or adapter.task != DETECTION:
            return None
        return BASE if asked.vision == "base" else adapter

    def answer(
        self, objects: Sequence[ClickedObject], beside: Sequence[tuple[PreparedImage, SlotAdapter]] = ()
    ) -> list[ClickAnswer | Exception]:
        """The answer for each object, as if it were alone; one that has none gives its exception.

        Args:
            beside: Images under adapters that share the vision pass, and leave their features in the cache.

        Raises:
            torch.OutOfMemoryError, MemoryError: Together they take too much memory.
            RuntimeError: The device failed (`is_device_error`).
        """
        problems = [self._problem(one) for one in objects]
        possible = [one for one, problem in zip(objects, problems, strict=True) if problem is None]
        found: Sequence[ClickAnswer | Exception]
        try:
            found = self._run(possible, beside) if possible else []
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            if len(possible) == 1 and not beside:
                found = [error]
            else:  # find the object that fails
                found = [answer for one in possible for answer in self.answer([one])]
        answers = iter(found)
        return [next(answers) if problem is None else problem for problem in problems]

    def _problem(self, asked: ClickedObject) -> Exception | None:
        side = self.enable().mask_side
        prompt = asked.prompt
        if (maker := self.maker(asked)) is None:
            return LookupError(f"slot {asked.slot} holds no adapter that finds objects")
        if asked.click_slot not in (None, *self._origins):
            return LookupError(f"slot {asked.click_slot} holds no click adapter")
        try:
            self.check(maker.slot, asked.click_slot)
        except UserError as error:
            return error
        if not len(prompt.points_k2) and prompt.box_xyxy is None and prompt.mask_mm is None:
            return UserError("nothing says where the object is: give a click, a box or a mask")
        if prompt.mask_mm is not None and prompt.mask_mm.shape != (side, side):
            return UserError(f"expected a mask of {side} x {side} logits, got {tuple(prompt.mask_mm.shape)}")
        return None

    def _run(
        self, objects: Sequence[ClickedObject], beside: Sequence[tuple[PreparedImage, SlotAdapter]]
    ) -> list[ClickAnswer | Exception]:
        features = self._features_of(objects, beside)
        answers: dict[int, ClickAnswer | Exception] = {}
        # Neighbours are of one image where possible: its features need no copy then.
        by_image = sorted(range(len(objects)), key=lambda number: id(features[number]))
        for numbers in groups_of_kind([one.prompt for one in objects], by_image):
            found = self._decode([objects[number] for number in numbers], [features[number] for number in numbers])
            answers |= zip(numbers, found, strict=True)
            self.counts["click_decodes"] += 1
        self.counts["objects_clicked"] += len(objects)
        return [answers[number] for number in range(len(objects))]

    def _features_of(
        self, objects: Sequence[ClickedObject], beside: Sequence[tuple[PreparedImage, SlotAdapter]]
    ) -> list[ClickFeatures]:
        """What the mask decoder reads, for each object; objects of one vision pass share it."""
        head = self.enable()
        makers = [(self.maker(one) or BASE).of("vision_encoder") for one in objects]
        wanted = list(zip([one.image for one in objects], makers, strict=True))
        others = [(image, adapter) for image, adapter in beside if image.features is None]
        for image, _ in [*wanted, *others]:
            if image.features is None:
                self._features.images.keep_image(image)
        vision = self._features.clickable([*wanted, *others])
        clicked = {(image.key, maker.version) for image, maker in wanted}
        for key, of_image in vision.items():
            if key in clicked and of_image.clicks is None:
                assert of_image.trunk_1SC is not None
                of_image.clicks, of_image.trunk_1SC = head.embed(of_image.trunk_1SC), None
                self._features.images.weigh_features(*key, of_image)
        return [cast("ClickFeatures", vision[image.key, maker.version].clicks) for image, maker in wanted]

    def _decode(
        self, objects: Sequence[ClickedObject], features: Sequence[ClickFeatures]
    ) -> list[ClickAnswer | Exception]:
        """Answers to prompts of one kind."""
        head, bank = self._load()
        with bank.rows([one.click_slot for one in objects]):
            output = decode_prompts(head, type(features[0]).of_each(features), [one.prompt for one in objects])
        logits_NMmm, iou_NM, object_N = (
            download(values) for values in (output.logits_NMmm, output.iou_NM, output.object_N.sigmoid())
        )
        return [_answer(*of_object) for of_object in zip(logits_NMmm, iou_NM, object_N, strict=True)]


def _answer(logits_Mmm: Tensor, iou_M: Tensor, object_score: Tensor) -> ClickAnswer | NotFiniteError:
    if not all(bool(values.isfinite().all()) for values in (logits_Mmm, iou_M, object_score)):
        return NotFiniteError("the masks for this object are NaN or infinite")
    return ClickAnswer.of(logits_Mmm.clone(), iou_M.tolist(), object_score.item())  # without the rows of others
