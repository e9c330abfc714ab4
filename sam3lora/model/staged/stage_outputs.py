"""The outputs of the stages of SAM 3: vision features, text features, and the detector's output.

Shapes: ``I`` images, ``P`` distinct prompts, ``B`` find queries (image, prompt), ``Q`` object queries, ``L`` decoder
layers, ``T`` prompt tokens, ``S`` image tokens, ``C`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class VisionFeatures:
    """Feature maps of ``I`` images, finest first, without the coarsest level, which SAM 3 discards.

    `StagedSam3.prepare` adds ``begun_ISC`` and ``cls_I1C``, the part of the detector's work that no prompt changes.
    """

    maps_ICHW: list[Tensor]
    positions_1CHW: list[Tensor]
    begun_ISC: Tensor | None = None
    cls_I1C: Tensor | None = None

    @classmethod
    def from_output(cls, output: Any) -> VisionFeatures:
        """From the output of ``Sam3Model.vision_encoder``."""
        positions = [position[:1] for position in output.fpn_position_encoding[:-1]]
        return cls(list(output.fpn_hidden_states[:-1]), positions)

    def select(self, image_index_B: Tensor) -> list[Tensor]:
        return [rows_of(maps, image_index_B) for maps in self.maps_ICHW]

    def split(self) -> list[VisionFeatures]:
        """The features of each image alone (I = 1), as views."""
        return [
            VisionFeatures([maps[i : i + 1] for maps in self.maps_ICHW], self.positions_1CHW)
            for i in range(len(self.maps_ICHW[0]))
        ]

    def tensors(self) -> list[Tensor]:
        """All tensors that depend on the images."""
        return [*self.maps_ICHW, *(one for one in (self.begun_ISC, self.cls_I1C) if one is not None)]

    def detached(self) -> VisionFeatures:
        """The same values as leaves that collect gradients, so that chunks of prompts share one vision pass."""
        return replace(
            self,
            maps_ICHW=[_leaf(maps) for maps in self.maps_ICHW],
            begun_ISC=None if self.begun_ISC is None else _leaf(self.begun_ISC),
            cls_I1C=None if self.cls_I1C is None else _leaf(self.cls_I1C),
        )


@dataclass
class TextFeatures:
    """Token features of ``P`` prompts; ``mask_PT`` is True at real tokens."""

    embeds_PTC: Tensor
    mask_PT: Tensor

    def detached(self) -> TextFeatures:
        return replace(self, embeds_PTC=_leaf(self.embeds_PTC))


def rows_of(values_I: Tensor, image_index_B: Tensor) -> Tensor:
    """The rows (B, ...) of the images of ``B`` find queries; a single image is not copied."""
    if len(values_I) == 1:
        return values_I.expand(len(image_index_B), *values_I.shape[1:])
    return values_I.index_select(0, image_index_B)


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_(values.requires_grad)


SLOPE_BEYOND_LIMITS = 0.1


@dataclass
class DetectorOutput:
    """Output of the decoder for ``B`` find queries, with the inputs of the mask head.

    ``boxes_cxcywh_LBQ4`` are float32 in units of the input's sides; presence is not multiplied into the logits.
    ``presence_logits_LB`` are limited to +-10, as by the stock model, ``raw_presence_logits_LB`` are not. The ``o2m``
    fields are None unless the one-to-many branch was asked for.
    """

    logits_LBQ: Tensor
    boxes_cxcywh_LBQ4: Tensor
    presence_logits_LB: Tensor
    raw_presence_logits_LB: Tensor
    logits_o2m_LBQ: Tensor | None
    boxes_o2m_LBQ4: Tensor | None
    hidden_BQC: dict[str, Tensor]
    encoder_hidden_BSC: Tensor
    prompt_BTC: Tensor
    prompt_mask_BT: Tensor
    image_index_B: Tensor
    vision: VisionFeatures

    def scores_BQ(self) -> Tensor:
        """Probability that each object query is an instance of its prompt: sigmoid(logit) x sigmoid(presence)."""
        return self.logits_LBQ[-1].float().sigmoid() * self.presence_logits_LB[-1].float().sigmoid()[:, None]

    def presence_to_learn_LB(self) -> Tensor:
        """Presence logits for a loss: beyond their limits they go on, with a part of the slope.

        Limited logits have no gradient there, so a word that the base firmly rejects could not be taught. SAM 3's own
        training takes raw ones (the result of its limit is discarded), in which the presence of such a word outweighs
        all other terms for many steps.
        """
        return torch.lerp(self.presence_logits_LB, self.raw_presence_logits_LB, SLOPE_BEYOND_LIMITS)
