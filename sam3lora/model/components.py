"""Components: the named parts of a SAM 3 model, and the component of a module or parameter.

Component flags, per-component learning rates, parameter tables and gradient checkpointing all use these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from sam3lora.config.components import COMPONENT_ROOTS
from sam3lora.config.components import COMPONENTS as COMPONENTS

_COMPONENT_OF_ROOT = {root: component for component, roots in COMPONENT_ROOTS.items() for root in roots}

# Prefixes of DDP, torch.compile, PEFT and Sam3VideoModel before a Sam3Model's own names.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "detector_model.")


def bare_name(name: str) -> str:
    """The name of a module or parameter in the plain base model, without the parts that wrappers and adapters add.

    >>> bare_name("base_model.model.vision_encoder.backbone.layers.0.mlp.fc1.base_layer.weight")
    'vision_encoder.backbone.layers.0.mlp.fc1.weight'
    >>> bare_name("dot_product_scoring.text_proj.original_module.weight")  # beside PEFT's `modules_to_save`
    'dot_product_scoring.text_proj.weight'
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name.replace(".base_layer", "").replace(".original_module", "")


def component_of(name: str) -> str | None:
    """Component of a module or parameter name (wrapped or not); None for a name outside SAM 3's components.

    >>> component_of("dot_product_scoring.query_proj"), component_of("lm_head")
    ('scoring', None)
    """
    return _COMPONENT_OF_ROOT.get(bare_name(name).split(".", 1)[0])


def unwrap(model: nn.Module) -> nn.Module:
    """The base model inside DDP, torch.compile and PEFT wrappers (adapter layers stay in place)."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif callable(get_base_model := getattr(model, "get_base_model", None)):
            return unwrap(get_base_model())
        else:
            return model


def component_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Root modules of each component of the model, in the order of ``COMPONENTS``."""
    children = dict(unwrap(model).named_children())
    found = {
        component: [children[root] for root in roots if root in children]
        for component, roots in COMPONENT_ROOTS.items()
    }
    return {component: modules for component, modules in found.items() if modules}


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(bare name, PEFT layer) of every module that carries a LoRA adapter, in model order."""
    from peft.tuners.lora import LoraLayer

    for name, module in unwrap(model).named_modules():
        if isinstance(module, LoraLayer):
            yield bare_name(name), cast(nn.Module, module)


def adapted_modules(model: nn.Module) -> tuple[str, ...]:
    """Names, as in the base model, of the modules that carry a LoRA adapter."""
    return tuple(name for name, _ in adapter_layers(model))


def never_gets_gradient(model: nn.Module, *, geometry_cls: bool = True) -> tuple[str, ...]:
    """Modules of a SAM 3 that no text-prompted training step can reach; empty for other models.

    - The CLIP tower's own projection is not used.
    - The coarsest feature level is computed and discarded, so its neck layer and the pixel decoder stages beyond the
      used levels have no effect.
    - The box layers of the geometry encoder get no box, and its self-attention gets the CLS token alone: one key has
      weight 1, whatever query and key are. Without the CLS token the whole geometry encoder is unused.
    """
    base = unwrap(model)
    modules = dict(base.named_modules())
    if "vision_encoder.neck" not in modules or "mask_decoder.pixel_decoder" not in modules:
        return ()
    num_levels = len(modules["vision_encoder.neck"].fpn_layers)
    names = ["text_encoder.text_projection", f"vision_encoder.neck.fpn_layers.{num_levels - 1}"]
    if geometry_cls:
        box_layers = ("boxes_direct_project", "boxes_pool_project", "boxes_pos_enc_project", "label_embed")
        names += [f"geometry_encoder.{layer}" for layer in (*box_layers, "vision_layer_norm")]
        for index in range(len(modules["geometry_encoder"].layers)):
            names += [f"geometry_encoder.layers.{index}.self_attn.{kind}_proj" for kind in ("q", "k")]
    else:
        names.append("geometry_encoder")
    num_stages = len(modules["mask_decoder.pixel_decoder"].conv_layers)
    for stage in range(num_levels - 2, num_stages):
        names += [f"mask_decoder.pixel_decoder.{kind}.{stage}" for kind in ("conv_layers", "norms")]
    return tuple(name for name in names if name in modules)
