"""The vision trunk, SAM 3's ViT, cut between two layers, so that tokens of unchanged layers can be kept.

Tokens between layers are (I, S, C): ``I`` images, ``S`` patches of a square image row by row, ``C`` channels. A cut is
the number of layers before it; the embeddings and the norm always come before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam3lora.model.staged.vit_layer import run_layers

TRUNK = "vision_encoder.backbone."
_LAYER = re.compile(re.escape(TRUNK) + r"layers\.(\d+)\.")


_BESIDE_THE_TRUNK = (
    "text_encoder",
    "text_projection",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "mask_decoder",
    "dot_product_scoring",
)


def unchanged_layers(adapted: Iterable[str], num_layers: int) -> int:
    """Number of the trunk's layers before the first of the ``adapted`` modules; ``num_layers`` if there is none."""
    first = num_layers
    for name in adapted:
        if name.startswith(TRUNK):
            match = _LAYER.match(name)
            first = min(first, int(match[1]) if match else 0)
    return first


def frozen_layers(trunk: Any) -> int:
    """Number of layers of a ``Sam3ViTModel`` before its first trainable parameter; all layers if there is none."""
    before = (trunk.embeddings, trunk.layer_norm)
    if any(parameter.requires_grad for module in before for parameter in module.parameters()):
        return 0
    for index, layer in enumerate(trunk.layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(trunk.layers)


def keep_trunk_only(sam3: Any) -> None:
    """Take all but the vision trunk out of a `Sam3Model`: half of its parameters."""
    for name in _BESIDE_THE_TRUNK:
        if hasattr(sam3, name):
            delattr(sam3, name)
    if hasattr(sam3.vision_encoder, "neck"):
        del sam3.vision_encoder.neck


def first_layers(trunk: Any, pixel_values_ICHW: Tensor, num_layers: int) -> Tensor:
    """Tokens (I, S, C) after the first ``num_layers`` layers of a ``Sam3ViTModel``."""
    tokens_ISC = trunk.embeddings(pixel_values_ICHW)
    tokens_IHWC = trunk.layer_norm(_as_map(tokens_ISC))
    return run_layers(trunk.layers[:num_layers], tokens_IHWC).flatten(1, 2)


def last_layers(trunk: Any, tokens_ISC: Tensor, num_layers: int) -> Tensor:
    """Tokens (I, S, C) after all layers, from those after the first ``num_layers``."""
    return run_layers(trunk.layers[num_layers:], _as_map(tokens_ISC)).flatten(1, 2)


def layer_outputs(trunk: Any, tokens_ISC: Tensor, layers: Sequence[int], start: int = 0) -> list[Tensor]:
    """Tokens (I, S, C) after each of some layers of a ``Sam3ViTModel``, from those after the first ``start`` layers.

    The numbers of the layers ascend from ``start``; layers after the last of them do not run.
    """
    found, tokens_IHWC = [], _as_map(tokens_ISC)
    for number in layers:
        tokens_IHWC = run_layers(trunk.layers[start : number + 1], tokens_IHWC)
        found.append(tokens_IHWC.flatten(1, 2))
        start = number + 1
    return found


def weights_of_first_layers(trunk: Any, num_layers: int) -> dict[str, Tensor]:
    """Parameters and buffers, by name, on which the tokens after the first ``num_layers`` layers depend."""
    modules = [("embeddings", trunk.embeddings), ("layer_norm", trunk.layer_norm)]
    modules += [(f"layers.{index}", layer) for index, layer in enumerate(trunk.layers[:num_layers])]
    found: dict[str, Tensor] = {}
    for prefix, module in modules:
        found |= dict(module.named_parameters(prefix)) | dict(module.named_buffers(prefix))
    return found


@torch.no_grad()
def token_type(trunk: Any) -> torch.dtype:
    """Type of the tokens between layers under the current autocast; a layer adds to them and keeps their type."""
    weight = trunk.embeddings.patch_embeddings.projection.weight
    side = trunk.config.patch_size
    pixels = torch.zeros(1, trunk.config.num_channels, side, side, dtype=weight.dtype, device=weight.device)
    return trunk.layer_norm(trunk.embeddings(pixels)).dtype


def _as_map(tokens_ISC: Tensor) -> Tensor:
    side = math.isqrt(tokens_ISC.shape[1])
    return tokens_ISC.unflatten(1, (side, side))
