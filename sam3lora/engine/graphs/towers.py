"""The vision and the text tower as stages.

Shapes: ``I`` images, ``P`` prompts, ``T`` tokens of a prompt, ``S`` image tokens, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam3lora.engine.clicks.features import ClickableFeatures
from sam3lora.engine.graphs.stage import Stage, StaticTensors
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures
from sam3lora.model.tokenization import MAX_PROMPT_TOKENS

MAX_IMAGES = 8
"""The most images that pass the vision tower together."""

MAX_PROMPTS = 32
"""The most prompts that pass the text tower together."""


class VisionStage:
    """The vision tower and its neck.

    `run_vision` is that of `MixedForward`; whether it keeps the trunk's tokens may not change. At most `capacity`
    images go together.
    """

    def __init__(
        self,
        staged: StagedSam3,
        stage: Callable[..., Stage],
        run_vision: Callable[[Tensor], tuple[VisionFeatures, Tensor | None]],
        capacity: int,
    ) -> None:
        self._staged = staged
        self._run_vision = run_vision
        self._keeps_trunk = False
        self._tensors = StaticTensors(capacity)
        self._positions_1CHW: list[Tensor] = []
        self.stage = stage("vision", self._encode, components=("vision_encoder",), fields=1, capacity=capacity)

    def encode(self, pixel_values_ICHW: Tensor, slots_I: Sequence[int | None]) -> list[VisionFeatures]:
        """Features of each image (I = 1), in memory of their own."""
        found: list[VisionFeatures] = []
        for start in range(0, len(slots_I), self._tensors.capacity):
            part = slice(start, start + self._tensors.capacity)
            found += self._encode_some(pixel_values_ICHW[part], slots_I[part])
        return found

    def _encode_some(self, pixel_values_ICHW: Tensor, slots_I: Sequence[int | None]) -> list[VisionFeatures]:
        self._tensors.keep("pixels", pixel_values_ICHW)
        self.stage.run(slots_I, [()] * len(slots_I))
        together = [self._tensors[f"map {level}"] for level in range(len(self._neck.fpn_layers) - 1)]
        if not self._positions_1CHW:  # the same for all images
            encoding = self._neck.position_encoding
            self._positions_1CHW = [encoding(one[:1].shape, one.device, one.dtype).clone() for one in together]
        kept = [*together, self._tensors["trunk"]] if self._keeps_trunk else together
        copies = [[torch.empty_like(one[:1]) for one in kept] for _ in slots_I]
        torch._foreach_copy_(
            [one for of_image in copies for one in of_image],
            [one[i : i + 1] for i in range(len(copies)) for one in kept],
        )
        if not self._keeps_trunk:
            return [VisionFeatures(of_image, self._positions_1CHW) for of_image in copies]
        return [ClickableFeatures(of_image[:-1], self._positions_1CHW, trunk_1SC=of_image[-1]) for of_image in copies]

    @property
    def _neck(self) -> Any:
        return self._staged.model.vision_encoder.neck

    def _encode(self, size: int) -> None:
        pixels_ICHW = self._tensors["pixels"][:size]
        vision, trunk_ISC = self._run_vision(pixels_ICHW)
        self._keeps_trunk = trunk_ISC is not None
        if trunk_ISC is not None:
            self._tensors.keep("trunk", trunk_ISC)
        for level, of_level in enumerate(vision.maps_ICHW):
            self._tensors.keep(f"map {level}", of_level)


class TextStage:
    """The text tower. Ids and mask of the prompts' tokens are the stage's controls."""

    def __init__(self, staged: StagedSam3, stage: Callable[..., Stage]) -> None:
        self._staged = staged
        self._tensors = StaticTensors(MAX_PROMPTS)
        self.stage = stage(
            "text",
            self._encode,
            components=("text_encoder",),
            fields=1 + 2 * MAX_PROMPT_TOKENS,
            capacity=MAX_PROMPTS,
        )

    def encode(
        self, input_ids_PT: Tensor, attention_mask_PT: Tensor, slots_P: Sequence[int | None]
    ) -> list[TextFeatures]:
        """Features of each prompt (P = 1), in memory of their own. Ids and mask are best on the host."""
        tokens_P = torch.cat([input_ids_PT, attention_mask_PT], 1).tolist()
        found: list[TextFeatures] = []
        for start in range(0, len(slots_P), MAX_PROMPTS):
            part = slice(start, start + MAX_PROMPTS)
            found += self._encode_some(tokens_P[part], slots_P[part])
        return found

    def _encode_some(self, tokens_P: list[list[int]], slots_P: Sequence[int | None]) -> list[TextFeatures]:
        self.stage.run(slots_P, tokens_P)
        embeds, mask = (self._tensors[name][: len(slots_P)] for name in ("embeds", "mask"))
        prompts = [TextFeatures(torch.empty_like(embeds[:1]), torch.empty_like(mask[:1])) for _ in slots_P]
        torch._foreach_copy_([one.embeds_PTC for one in prompts], embeds.split(1))
        torch._foreach_copy_([one.mask_PT for one in prompts], mask.split(1))
        return prompts

    def _encode(self, size: int) -> None:
        ids_PT, mask_PT = self.stage.controls_BF[:size, 1:].split(MAX_PROMPT_TOKENS, 1)
        text = self._staged.encode_text(ids_PT, mask_PT)
        self._tensors.keep("embeds", text.embeds_PTC)
        self._tensors.keep("mask", text.mask_PT)
