"""Quantisation of frozen linear layers to 4 bits with bitsandbytes: NF4 with double quantisation, as in QLoRA.

QLoRA: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.components import adapted_modules

QUANTIZED = ("vision_encoder.backbone.layers.", "detr_encoder.layers.", "detr_decoder.layers.")
"""Prefixes of the linear layers that are quantised; heads, prompts, box biases, neck and text tower are not."""

_BLOCK = (
    64  # weights that share a scale; on a CPU, bitsandbytes 0.50 restores rows wrongly that do not hold whole blocks
)


def quantize_nf4(model: nn.Module, device: torch.device | str) -> int:
    """Replace linear layers of a Sam3Model by 4-bit ones on ``device``, in place; return their number.

    This runs after loading, and not in transformers while it loads, so that the fingerprint, which adapters name, is
    that of the unquantised base. A weight takes half a byte, plus 0.016 byte for its scale; products are computed in
    bfloat16. PEFT supports LoRA and DoRA on such layers.

    Raises:
        UserError: bitsandbytes is not installed, or no layer has whole blocks.
        ValueError: The model carries an adapter.
    """
    if adapted_modules(model):
        raise ValueError("the model carries an adapter: quantise it before adapters are added")
    bitsandbytes = _bitsandbytes()
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(QUANTIZED) and module.in_features % _BLOCK == 0
    ]
    if not names:
        raise UserError(
            f"model.quantization is nf4, but no linear layer of {', '.join(QUANTIZED)} has a multiple of {_BLOCK} "
            "inputs: set it to none"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantized(bitsandbytes, model.get_submodule(name), device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it
    return len(names)


def _quantized(bitsandbytes: Any, linear: Any, device: torch.device | str) -> nn.Module:
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.contiguous(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.bias = linear.bias
    # bitsandbytes would switch to a CPU layout without a backward pass in the first forward of evaluation.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device).train(linear.training)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f'model.quantization "nf4" needs bitsandbytes ({error}): pip install "sam3lora[quantization]", or set it '
            "to none"
        ) from error
    return bitsandbytes
