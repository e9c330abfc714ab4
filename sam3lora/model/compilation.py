"""torch.compile of the vision trunk, one layer at a time: layers of a kind share one graph, which compiles fast."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sam3lora.errors import UserError


def compile_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Set each layer to be compiled in place at its first run, adapters and checkpointing included.

    Raises:
        UserError: The device's compiler is missing: a C++ compiler for a CPU, Triton for a GPU.
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
