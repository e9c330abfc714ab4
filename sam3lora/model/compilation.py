"""torch.compile of the vision trunk, a layer at a time: all layers of a kind share one graph, so it starts soon."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sam3lora.errors import UserError


def compile_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Compile each layer in place, when it first runs; names and weights stay. Adapters and checkpointing go along.

    Raises:
        UserError: What compiles for the device is not there: a C++ compiler for a CPU, Triton for a GPU.
    """
    missing = _missing_compiler(device)
    if missing is not None:
        raise UserError(f"training.compile is true, but {missing}: install one, or set training.compile to false")
    for layer in layers:
        layer.compile()


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton does not work here"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch finds no C++ compiler (g++ or clang++; the variable CXX names another)"
    return None
