"""`ClickHead`: masks from points, boxes and masks, as SAM 1 and 2 make them, on the tokens of SAM 3's vision trunk.

SAM 3's tracker has a neck, a prompt encoder and a mask decoder of its own over the detector's ViT. transformers'
`Sam3TrackerModel` leaves the embedding for "no memory" out of the image's features; here it is added, as in the
original and in transformers' video tracker.

Shapes: `I` images, `N` objects, `K` clicks, `M` masks of an object (3 alternatives or 1), `g` patches to a side, `m` =
4g, `c` channels of the tracker. Points and boxes are pixels of the square model input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3VisionConfig
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck
from transformers.models.sam3_tracker.configuration_sam3_tracker import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
)
from transformers.models.sam3_tracker.modeling_sam3_tracker import (
    Sam3TrackerMaskDecoder,
    Sam3TrackerPositionalEmbedding,
    Sam3TrackerPromptEncoder,
)

from sam3lora.model.clicks import MASK_LIMIT


@dataclass
class ClickFeatures:
    """What the mask decoder reads of `I` images: (I, c/8, 4g, 4g), (I, c/4, 2g, 2g) and (I, c, g, g)."""

    fine: Tensor
    middle: Tensor
    coarse: Tensor

    def of_objects(self, image_N: Tensor) -> ClickFeatures:
        """Rows for objects; `image_N` is the image of each. Objects of one image alone are views."""
        if len(self.coarse) == 1:
            return ClickFeatures(*(one.expand(len(image_N), -1, -1, -1) for one in self.tensors()))
        return ClickFeatures(*(one[image_N] for one in self.tensors()))

    @classmethod
    def of_each(cls, features_N: Sequence[ClickFeatures]) -> ClickFeatures:
        """Rows for objects from the features of the image of each; objects of one image alone are views."""
        if all(one is features_N[0] for one in features_N):
            return cls(*(one.expand(len(features_N), -1, -1, -1) for one in features_N[0].tensors()))
        return cls(*(torch.cat(rows) for rows in zip(*(one.tensors() for one in features_N), strict=True)))

    def split(self) -> list[ClickFeatures]:
        """The features of each image alone, as views."""
        rows = [one.split(1) for one in self.tensors()]
        return [ClickFeatures(*parts) for parts in zip(*rows, strict=True)]

    def tensors(self) -> list[Tensor]:
        return [self.fine, self.middle, self.coarse]


@dataclass
class ClickOutput:
    """What the mask decoder says of `N` objects, in float32.

    Attributes:
        logits_NMmm: Logits (N, M, m, m); above 0 is the object.
        iou_NM: The decoder's own estimate in [0, 1] of the IoU of each mask with the object.
        object_N: Logits of whether the object is there.
    """

    logits_NMmm: Tensor
    iou_NM: Tensor
    object_N: Tensor


class ClickHead(nn.Module):
    """The tracker's neck, prompt encoder and mask decoder, without its memory.

    `input_side` is the side of the square model input in pixels.

    Args:
        vision: Configuration of trunk and neck.
        prompts: Its `image_size` is the input side.
        decoder: Has the width of the neck.

    Raises:
        ValueError: The input is not square.
    """

    def __init__(
        self,
        vision: Sam3VisionConfig,
        prompts: Sam3TrackerPromptEncoderConfig,
        decoder: Sam3TrackerMaskDecoderConfig,
    ) -> None:
        super().__init__()
        decoder._attn_implementation = "sdpa"
        if not isinstance(prompts.image_size, int):
            raise ValueError(f"expected a square model input, got {prompts.image_size}")
        self.input_side = prompts.image_size
        self.neck = Sam3VisionNeck(vision)
        self.prompt_encoder = Sam3TrackerPromptEncoder(prompts)
        self.mask_decoder = Sam3TrackerMaskDecoder(decoder)
        self.shared_image_embedding = Sam3TrackerPositionalEmbedding(prompts)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, vision.fpn_hidden_size))

    @property
    def mask_side(self) -> int:
        """m, the side of masks."""
        return int(self.prompt_encoder.mask_input_size[0])

    def embed(self, trunk_ISC: Tensor) -> ClickFeatures:
        """Features of images from the tokens (I, S, C) after all layers of the trunk."""
        side = math.isqrt(trunk_ISC.shape[1])
        tokens_ICHW = trunk_ISC.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        fine, middle, coarse = (layer(tokens_ICHW) for layer in list(self.neck.fpn_layers)[:3])
        return self.finish_maps(fine, middle, coarse)

    def finish_maps(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> ClickFeatures:
        """Features from the neck's maps (I, c, 4g, 4g), (I, c, 2g, 2g) and (I, c, g, g)."""
        decoder = self.mask_decoder
        coarse = (coarse + self.no_memory_embedding.view(1, -1, 1, 1)).to(coarse.dtype)
        return ClickFeatures(decoder.conv_s0(fine), decoder.conv_s1(middle), coarse)

    def decode(
        self,
        features: ClickFeatures,
        *,
        points_NK2: Tensor | None = None,
        labels_NK: Tensor | None = None,
        boxes_N4: Tensor | None = None,
        masks_Nmm: Tensor | None = None,
        multimask: bool,
    ) -> ClickOutput:
        """Masks of `N` objects, each by the same number of clicks.

        Args:
            features: With a row for each object.
            labels_NK: 1 where the click is in the object, 0 where it is outside.
            boxes_N4: Left, top, right and bottom.
            masks_Nmm: Logits of a mask to start from; beyond `MASK_LIMIT` they are cut.
            multimask: Three alternatives instead of one mask.

        Raises:
            ValueError: Nothing says where the objects are.
        """
        if points_NK2 is None and boxes_N4 is None and masks_Nmm is None:
            raise ValueError("expected points, boxes or masks")
        number = len(features.coarse)
        sparse, dense = self._prompts(number, points_NK2, labels_NK, boxes_N4, masks_Nmm)
        logits, iou, _, objects = self.mask_decoder(
            image_embeddings=features.coarse,
            image_positional_embeddings=self._positions().to(features.coarse.dtype).expand(number, -1, -1, -1),
            sparse_prompt_embeddings=sparse.to(features.coarse.dtype),
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=[features.fine, features.middle],
        )
        return ClickOutput(logits[:, 0].float(), iou[:, 0].float(), objects[:, 0, 0].float())

    def _prompts(
        self, number: int, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (N, 1, tokens, c) of points and boxes, and (N, c, g, g) of masks."""
        encoder: Any = self.prompt_encoder
        weight = encoder.no_mask_embed.weight
        if points is None and boxes is None:  # a mask alone goes with one point that is none
            points, labels = weight.new_zeros(number, 1, 2), torch.full((number, 1), -1, device=weight.device)
        if masks is not None:
            masks = masks[:, None].clamp(-MASK_LIMIT, MASK_LIMIT).to(weight.dtype)
        # Coordinates in bfloat16 would be off by pixels.
        with torch.autocast(weight.device.type, enabled=False):
            sparse, _ = encoder(
                input_points=None if points is None else points[:, None].float(),
                input_labels=None if labels is None else labels[:, None].int(),
                input_boxes=None if boxes is None else boxes[:, None].float(),
                input_masks=None,
            )
        if masks is None:
            return sparse, weight.reshape(1, -1, 1, 1).expand(number, -1, *encoder.image_embedding_size)
        return sparse, encoder.mask_embed(masks)

    def _positions(self) -> Tensor:
        """Embeddings (1, c, g, g) of the places of the coarse map."""
        height, width = self.prompt_encoder.image_embedding_size
        matrix = self.shared_image_embedding.positional_embedding
        with torch.autocast(matrix.device.type, enabled=False):
            y = (torch.arange(height, device=matrix.device, dtype=matrix.dtype) + 0.5) / height
            x = (torch.arange(width, device=matrix.device, dtype=matrix.dtype) + 0.5) / width
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
            return self.shared_image_embedding(grid).permute(2, 0, 1)[None]
