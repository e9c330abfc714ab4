"""Gradient checkpointing of the towers; the detector's parts are checkpointed where ``forward.py`` drives them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_checkpointing(model: nn.Module, components: Iterable[str]) -> int:
    """Let the transformer layers of the vision and text towers recompute their activations; return how many will.

    ``Sam3Model.gradient_checkpointing_enable()`` refuses, because transformers supports it for these two towers only.
    It is active in training mode; the other components are named to ``StagedSam3(checkpointing=...)``.
    """
    chosen = tuple(f"{component}." for component in components)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = name.startswith(chosen)
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
            count += module.gradient_checkpointing
    return count
