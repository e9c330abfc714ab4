"""Frozen weights stored in the type to which autocast casts them, which saves memory."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from sam3lora.model.components import adapted_modules, bare_name, unwrap

_MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
# `StagedSam3` runs these outside autocast.
_OUTSIDE_AUTOCAST: tuple[str, ...] = ("geometry_encoder.", "detr_decoder.box_head.")
_TEXT = ("text_encoder.", "text_projection")
# The forward casts the input of these modules to the type of their weights, and an adapter there gets that input.
_TYPE_IS_READ = (
    "vision_encoder.backbone.embeddings.patch_embeddings.",
    "vision_encoder.neck.",
    "detr_decoder.ref_point_head.",
)


def store_matrices_in(model: nn.Module, dtype: torch.dtype, *, text_tower: bool = False) -> int:
    """Store the frozen weights of linear and convolution layers in the type to which autocast casts them.

    Otherwise autocast casts them in every forward, and the backward pass keeps the copies. Outputs and gradients under
    autocast of this type stay the same bit for bit. Weights that autocast does not cast keep their type: norms,
    embeddings, position tables, adapters, layers that run outside autocast, and base layers whose values DoRA reads.

    From then on the model, plain or with PEFT layers, runs under autocast of `dtype` only. `text_tower` tells whether
    the text tower runs under autocast as well. Returns the number of bytes saved.
    """
    base = unwrap(model)
    adapted = adapted_modules(base)
    stay = _OUTSIDE_AUTOCAST + (() if text_tower else _TEXT)
    stay += tuple(prefix for prefix in _TYPE_IS_READ if any(name.startswith(prefix) for name in adapted))
    lora_layers = [layer for layer in base.modules() if isinstance(layer, LoraLayer)]
    read_by_dora = {id(layer.get_base_layer()) for layer in lora_layers if any(layer.use_dora.values())}
    saved = 0
    for name, module in base.named_modules():
        is_base = ".lora_" not in name and id(module) not in read_by_dora and not bare_name(name).startswith(stay)
        if is_base and isinstance(module, _MATRICES):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32 and not parameter.requires_grad:
                    before = parameter.nbytes
                    parameter.data = parameter.data.to(dtype)
                    saved += before - parameter.nbytes
    return saved
