"""SAM 3's attention layers, as their own forward computes them, with projections of the same input made together.

Shapes: ``B`` rows, ``T`` and ``S`` tokens that ask and that are asked, ``C`` channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam3.modeling_sam3 import eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from sam3lora.model.adapter.lora_products import linear_outputs


def attend(attention: Any, query_BTC: Tensor, key_BSC: Tensor, value_BSC: Tensor, mask: Tensor | None = None) -> Tensor:
    """The output (B, T, C) of a ``Sam3Attention``. Arguments that are one tensor are projected together."""
    query, key, value = project(attention, query_BTC, key_BSC, value_BSC)
    return attend_projected(attention, query, key, value, mask)


def project(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values with a last axis for each head: (..., heads, channels of a head)."""
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    inputs: dict[int, tuple[Tensor, list[nn.Module]]] = {}
    for tensor, layer in zip((query, key, value), layers, strict=True):
        inputs.setdefault(id(tensor), (tensor, []))[1].append(layer)
    made: dict[nn.Module, Tensor] = {}
    for tensor, readers in inputs.values():
        made |= zip(readers, linear_outputs(readers, tensor), strict=True)
    return [made[layer].unflatten(-1, (-1, attention.head_dim)) for layer in layers]


def attend_projected(
    attention: Any, query_BThc: Tensor, key_BShc: Tensor, value_BShc: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The output (B, T, C) from what `project` returned."""
    implementation = attention.config._attn_implementation
    if mask is not None and mask.is_floating_point() and is_flash_attention_requested(attention.config):
        implementation = "sdpa"  # flash attention knows no additive mask: as the stock layer does
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    attended, _ = function(
        attention,
        query_BThc.transpose(1, 2),
        key_BShc.transpose(1, 2),
        value_BShc.transpose(1, 2),
        attention_mask=mask,
        dropout=getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0,
        scaling=attention.scaling,
        is_causal=False,
    )
    return attention.o_proj(attended.flatten(2))
