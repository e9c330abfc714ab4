"""Selection of the modules that get an adapter, from the target names of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sam3lora.errors import UserError
from sam3lora.model.components import COMPONENTS, component_modules, component_of, never_gets_gradient

_VIT_LAYER = re.compile(r"vision_encoder\.backbone\.layers\.(\d+)\.")


def select_modules(
    model: nn.Module,
    targets: Sequence[str],
    *,
    components: Iterable[str] | None = None,
    vision_last_layers: int | None = None,
    geometry_cls: bool = True,
) -> tuple[str, ...]:
    """Names of the Linear and Conv2d modules to adapt, in model order.

    Modules that no training step reaches (:func:`never_gets_gradient`) are left out.

    Args:
        targets: The last dotted part or parts of a module name (``q_proj``, ``box_head.layer1``). The name of a
            container (``box_head``) stands for every Linear and Conv2d inside it. Known aliases (``qkv``) are resolved.
        components: Names of ``COMPONENTS`` to adapt; None adapts the whole model, also one that is not a SAM 3.
        vision_last_layers: Number of ViT layers to adapt, counted from the last. The neck is not a ViT layer.
        geometry_cls: Whether training adds the geometry CLS token; without it the geometry encoder is never used.

    Raises:
        UserError: A component is unknown, a target or component matches nothing, LoRA cannot adapt a target
            (ConvTranspose2d), or ``vision_last_layers`` is out of range or has no effect.
    """
    if not targets:
        raise UserError("lora.target_modules is empty: name at least one module, for example q_proj and v_proj")
    components = _check_components(model, components)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and (components is None or component_of(name) in components)
    }
    idle = never_gets_gradient(model, geometry_cls=geometry_cls)
    early = _early_vit_layers(modules, vision_last_layers)
    selected: set[str] = set()
    for target in targets:
        named = _modules_named(modules, target)
        trained = {name for name in named if not _is_under(name, idle)}
        if not trained:
            raise UserError(_nothing_matched(target, named, modules, components))
        selected |= {name for name in trained if name not in early}
    for component in components or ():
        if not any(component_of(name) == component for name in selected):
            raise UserError(
                f"lora.apply_to_{component} is on, but none of the target modules {list(targets)} is in it; "
                f"its modules are: {', '.join(_suffixes(modules, component))}. Add one of them or switch the flag off"
            )
    if not selected:
        raise UserError(f"no module is left to adapt with vision_last_layers={vision_last_layers}: raise it")
    return tuple(name for name in modules if name in selected)


def _check_components(model: nn.Module, components: Iterable[str] | None) -> tuple[str, ...] | None:
    if components is None:
        return None
    components = tuple(components)
    if not components:
        raise UserError("no component is chosen: set at least one lora.apply_to_* flag, for example vision_encoder")
    present = component_modules(model)
    for component in components:
        if component not in COMPONENTS:
            raise UserError(f"unknown component {component!r}: expected one of {', '.join(COMPONENTS)}")
        if component not in present:
            raise UserError(
                f"{type(model).__name__} has no component {component!r}; it has: {', '.join(present) or 'none'}. "
                "For a model that is not SAM 3 use components=None"
            )
    return components


def _modules_named(modules: dict[str, nn.Module], target: str) -> set[str]:
    """Adaptable modules that ``target``, or the name it is an alias of, names directly or as their container."""
    from sam3lora.config.aliases import resolve_target_modules

    names = {target, *resolve_target_modules([target])}
    hits = [name for name in modules if any(name == suffix or name.endswith("." + suffix) for suffix in names)]
    for name in hits:
        if isinstance(modules[name], (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            raise UserError(
                f"lora.target_modules: {target!r} names {name}, a {type(modules[name]).__name__}, which LoRA cannot "
                "adapt. Use Linear or Conv2d modules, in the neck for example proj1 and proj2"
            )
    return {name for name in modules if _is_adaptable(modules[name]) and _is_under(name, hits)}


def _is_adaptable(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its out_proj without calling it: an adapter there would do nothing.
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _is_under(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _early_vit_layers(modules: dict[str, nn.Module], last_layers: int | None) -> set[str]:
    """Names of the ViT's modules that ``vision_last_layers`` leaves frozen."""
    if last_layers is None:
        return set()
    layer_of = {name: int(match[1]) for name in modules if (match := _VIT_LAYER.match(name))}
    if not layer_of:
        raise UserError("lora.vision_last_layers has no effect here: set lora.apply_to_vision_encoder or remove it")
    num_layers = max(layer_of.values()) + 1
    if not 1 <= last_layers <= num_layers:
        raise UserError(f"lora.vision_last_layers must be between 1 and {num_layers}, got {last_layers}")
    first = num_layers - last_layers
    embeddings = {name for name in modules if name.startswith("vision_encoder.backbone.embeddings")}
    return {name for name, layer in layer_of.items() if layer < first} | embeddings


def _suffixes(modules: dict[str, nn.Module], component: str | None) -> list[str]:
    """Short names of the adaptable modules, with the parent's name before a bare number (``layer1``, ``0``)."""
    short = []
    for name, module in modules.items():
        if _is_adaptable(module) and (component is None or component_of(name) == component):
            parts = name.split(".")
            short.append(".".join(parts[-2:]) if re.fullmatch(r"(layer)?\d+", parts[-1]) else parts[-1])
    return list(dict.fromkeys(short))


def _nothing_matched(
    target: str, named: set[str], modules: dict[str, nn.Module], components: tuple[str, ...] | None
) -> str:
    if named:
        return (
            f"lora.target_modules: {target!r} names only modules that never get a gradient in training with text "
            f"prompts ({', '.join(sorted(named))}): remove it"
        )
    where = "in the model" if components is None else f"in {', '.join(components)}"
    available = [
        f"{component or 'modules'}: {', '.join(_suffixes(modules, component)) or 'none'}"
        for component in components or (None,)
    ]
    return f"lora.target_modules: {target!r} matches no module {where}. Available - {'; '.join(available)}"
