"""Gradient checkpointing: layers that recompute their activations in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sam3lora.model.components import COMPONENTS, component_of, unwrap

_TOWERS = ("vision_encoder", "text_encoder")


def enable_checkpointing(model: nn.Module, components: Iterable[str]) -> int:
    """Make the transformer layers of the vision and text towers recompute their activations; return their number.

    Layers before a tower's first trainable one are left out: they keep no activations. Checkpointing is active in
    training mode. ``Sam3Model.gradient_checkpointing_enable()`` cannot be used, because transformers supports these two
    towers only; the other components go to ``StagedSam3(checkpointing=...)``.
    """
    chosen = frozenset(components)
    count = 0
    learning: set[str | None] = set()
    for name, module in unwrap(model).named_modules():
        component = component_of(name)
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            learning.add(component)
        if isinstance(module, GradientCheckpointingLayer):
            if any(parameter.requires_grad for parameter in module.parameters()):
                learning.add(component)
            module.gradient_checkpointing = component in chosen and component in learning
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
            count += module.gradient_checkpointing
    return count


def worth_checkpointing(model: nn.Module, components: Iterable[str]) -> tuple[str, ...]:
    """The components that a backward pass goes through: they have trainable parameters, or one before them has."""
    learning = {component_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return tuple(
        component
        for component in components
        if component in learning or (component not in _TOWERS and learning & _before(component))
    )


def _before(component: str) -> set[str]:
    return set(COMPONENTS[: COMPONENTS.index(component)])
