"""Keys of `lora`."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from sam3lora.config import COMPONENTS
from sam3lora.model.components import adapted_modules, component_of

from ...model.conftest import randomise_adapter
from .conftest import acts


def first_layer(worker) -> LoraLayer:
    return next(module for module in worker.model.modules() if isinstance(module, LoraLayer))


def update_size(worker) -> float:
    """Size of the weight update of one layer, with the same A and B whatever the settings."""
    layer = first_layer(worker)
    layer.lora_A["default"].weight.data.fill_(1.0)
    layer.lora_B["default"].weight.data.fill_(1.0)
    return layer.get_delta_weight("default").abs().mean().item()


@acts("lora.rank")
def test_rank_is_the_inner_size(build):
    for rank in (2, 5):
        tensors = get_peft_model_state_dict(build(f"lora.rank={rank}").model)
        assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {rank}


@acts("lora.alpha")
def test_alpha_scales_the_update(build):
    assert update_size(build("lora.alpha=12")) == pytest.approx(3 * update_size(build("lora.alpha=4")))


@acts("lora.use_rslora")
def test_rslora_divides_by_the_root_of_the_rank(build):
    plain, stable = build("lora.rank=4"), build("lora.rank=4", "lora.use_rslora=true")
    assert update_size(stable) == pytest.approx(2 * update_size(plain))


@acts("lora.use_dora")
def test_dora_learns_magnitudes(shared):
    def magnitudes(*overrides):
        return [name for name in get_peft_model_state_dict(shared(*overrides).model) if "magnitude" in name]

    assert not magnitudes()
    assert magnitudes("lora.use_dora=true")


@acts("lora.dropout")
def test_dropout_is_on_the_input_of_the_adapter(build):
    def varies(*overrides):
        worker = build(*overrides)
        randomise_adapter(worker.model)
        layer = first_layer(worker).train()
        x = torch.ones(64, layer.in_features)
        return not torch.equal(layer(x), layer(x))

    assert not varies("lora.dropout=0")
    assert varies("lora.dropout=0.5")


@acts("lora.target_modules")
def test_target_modules_name_the_layers(shared):
    def suffixes(*overrides):
        return {name.rpartition(".")[2] for name in adapted_modules(shared(*overrides).model)}

    assert suffixes() == {"q_proj", "v_proj"}
    # An alias of other trainers' files means all of its layers.
    assert suffixes("lora.target_modules=[qkv, fc1]") == {"q_proj", "k_proj", "v_proj", "fc1"}


@acts(*(f"lora.apply_to_{component}" for component in COMPONENTS))
@pytest.mark.parametrize("component", COMPONENTS)
def test_flag_adapts_its_component(component, shared):
    # The second component makes a valid adapter without the flag; layer1 is the only name that scoring shares.
    other = "mask_decoder" if component == "detr_decoder" else "detr_decoder"
    target = "layer1" if component == "scoring" else "q_proj"
    common = [f"lora.target_modules=[{target}]", "lora.apply_to_detr_decoder=false", f"lora.apply_to_{other}=true"]

    def adapted(*overrides):
        return {component_of(name) for name in adapted_modules(shared(*common, *overrides).model)}

    assert adapted() == {other}
    assert adapted(f"lora.apply_to_{component}=true") == {other, component}


@acts("lora.vision_last_layers")
def test_vision_last_layers_spare_the_early_ones(build):
    def layers(*overrides):
        names = adapted_modules(build("lora.apply_to_vision_encoder=true", *overrides).model)
        return {name.split(".")[3] for name in names if name.startswith("vision_encoder.backbone.layers.")}

    assert layers() == {"0", "1", "2"}
    assert layers("lora.vision_last_layers=1") == {"2"}
