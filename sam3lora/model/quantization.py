"""Frozen linear layers in 4 bits, by bitsandbytes: NF4 with double quantisation, as in QLoRA.

QLoRA: https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.components import adapted_modules

QUANTIZED = ("vision_encoder.backbone.layers.", "detr_encoder.layers.", "detr_decoder.layers.")
"""Where linear layers are quantised. Heads, prompts, box biases, the neck and the text tower keep their precision."""


_BLOCK = 64  # weights with one scale; bitsandbytes 0.50 restores rows that do not hold whole blocks wrongly on a CPU


def quantize_nf4(model: nn.Module, device: torch.device | str) -> int:
    """Replace linear layers of a Sam3Model by ones of 4 bits on ``device``, in place; return how many.

    transformers would quantise while it loads; a base that is loaded whole has the fingerprint of the unquantised one,
    which adapters name, and leaves out the tracker of a video checkpoint as ever. Half a byte a weight, and 0.016 byte
    for its scale; products are computed in bfloat16. PEFT puts LoRA and DoRA on such layers by itself.

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
    # Its layout for inference on a CPU is taken in the first forward of evaluation, and has no backward pass.
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
