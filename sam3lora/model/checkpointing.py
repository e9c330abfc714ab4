"""Gradient checkpointing: layers that recompute their activations in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sam3lora.model.adapter.keyed_dropout import can_draw_by_key, dropout_from, new_key
from sam3lora.model.adapter.lora_products import own_dropouts
from sam3lora.model.components import COMPONENTS, component_of, unwrap

_TOWERS = ("vision_encoder", "text_encoder")

_by_key: ContextVar[bool] = ContextVar("by_key", default=False)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose activations are computed again in the backward pass, with the same dropout."""
    if not _by_key.get():
        return checkpoint(function, *arguments, use_reentrant=False)
    key = new_key(next(leaf.device for leaf in tree_iter(arguments) if isinstance(leaf, Tensor)))
    return checkpoint(_with_key, function, key, *arguments, use_reentrant=False, preserve_rng_state=False)


def _with_key(function: Callable[..., Any], key: Tensor, *arguments: Any) -> Any:
    with dropout_from(key):
        return function(*arguments)


@contextmanager
def recomputed_by_key() -> Iterator[None]:
    """Inside, `recomputed` draws dropout from a key, and the state of random number generators is left alone.

    So forward and backward pass can be captured as CUDA graphs. Other random numbers would differ in the backward pass:
    see `repeats_by_key`.
    """
    token = _by_key.set(True)
    try:
        yield
    finally:
        _by_key.reset(token)


def repeats_by_key(model: nn.Module, component: str) -> bool:
    """Whether layers of a component draw the same numbers again inside `recomputed_by_key`, in their present mode.

    They do if they draw nothing but the dropout of plain adapters. What is compiled draws in its own way.
    """
    drawn_by_key = own_dropouts(model) if can_draw_by_key() else set()
    return not any(
        module._compiled_call_impl is not None or (_draws(module) and module not in drawn_by_key)
        for name, module in model.named_modules()
        if component_of(name) == component
    )


def _draws(module: nn.Module) -> bool:
    """Whether a module's own code draws random numbers."""
    share = module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0)
    return module.training and bool(share)


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
            module._gradient_checkpointing_func = recomputed  # type: ignore[assignment]
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
