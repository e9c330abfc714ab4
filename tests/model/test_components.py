"""The named parts of the model, and the parts that no training step reaches."""

import torch

from sam3lora.model.components import (
    COMPONENTS,
    component_modules,
    component_of,
    never_gets_gradient,
)

from .conftest import make_inputs, noisy


def test_every_parameter_belongs_to_a_component(random_sam3):
    # A child of Sam3Model that no component owns would be left out of flags, tables and learning rates.
    assert {component_of(name) for name, _ in random_sam3.named_parameters()} == set(COMPONENTS)
    assert set(component_modules(random_sam3)) == set(COMPONENTS)


def test_component_of_sees_through_wrappers():
    # DDP, torch.compile, PEFT and the video model put prefixes in front.
    for prefix in ("", "base_model.model.", "module.base_model.model.", "detector_model.", "_orig_mod."):
        assert component_of(prefix + "dot_product_scoring.query_proj.lora_A.default.weight") == "scoring"
    assert component_of("text_projection.weight") == component_of("text_encoder.text_projection.weight")
    assert component_of("tracker_model.mask_decoder.x") is None


def _without_gradient(model, geometry_cls):
    model.requires_grad_(True)
    out = model(**make_inputs(geometry_cls=geometry_cls))
    names = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")
    sum(getattr(out, name).float().square().sum() for name in names).backward()
    largest = {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in _weights(model).items()}
    # A gradient that is zero in theory may be rounding noise, which AdamW would turn into steps of full size.
    noise = 1e-8 * max(largest.values())
    return {name for name, value in largest.items() if value <= noise}


def _weights(model):
    """Without biases: a constant added to all keys changes no attention, so theirs is rightly zero."""
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith("bias")}


def test_never_gets_gradient_is_exactly_what_stays_without_gradient(random_sam3):
    # Both ways: nothing trained is listed, nothing idle is forgotten.
    noisy(random_sam3)
    for geometry_cls in (True, False):
        random_sam3.zero_grad()
        idle = tuple(f"{name}." for name in never_gets_gradient(random_sam3, geometry_cls=geometry_cls))
        listed = {name for name in _weights(random_sam3) if name.startswith(idle)}
        assert _without_gradient(random_sam3, geometry_cls) == listed


def test_never_gets_gradient_is_empty_for_other_models():
    # The list is SAM 3's; a plain model has no such knowledge.
    assert never_gets_gradient(torch.nn.Sequential(torch.nn.Linear(2, 2))) == ()
