"""Compiled layers give what the plain ones give."""

from __future__ import annotations

import copy

import pytest
import torch

from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training import setup
from sam3lora.training.setup import compile_layers

from .conftest import randomise_adapter
from .test_precision import outputs_and_gradients

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(setup._missing_compiler(CPU) is not None, reason="torch finds no C++ compiler")
def test_compiled_equals_eager(random_sam3):
    # Outputs and gradients in float32, with window and global layers, adapters and checkpointing.
    model = apply_lora(random_sam3, LoraSettings(rank=2, dropout=0.0, components=("vision_encoder", "detr_decoder")))
    randomise_adapter(model)
    compiled = copy.deepcopy(model)
    layers = compiled.get_base_model().vision_encoder.backbone.layers
    compile_layers(layers, CPU)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    found = []
    for one in (model, compiled):
        one.train()
        assert enable_checkpointing(one, ["vision_encoder"]) == len(layers)
        staged = StagedSam3(one.get_base_model())
        values = outputs_and_gradients(staged, bf16=False)
        one.eval()
        with torch.no_grad():
            values["evaluated"] = staged.encode_trunk(torch.ones(1, 3, 112, 112))
        found.append(values)
    expected, actual = found
    assert actual.keys() == expected.keys()
    assert any("vision_encoder" in name and value.any() for name, value in expected.items())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name
    # Names of weights are those of the plain model: adapters are saved as ever.
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_without_a_compiler_it_says_what_is_missing(random_sam3, monkeypatch):
    monkeypatch.setattr(setup, "_missing_compiler", lambda device: "torch finds no C++ compiler")
    with pytest.raises(UserError, match="finds no C\\+\\+ compiler: install one, or set"):
        compile_layers([random_sam3.detr_encoder.layers[0]], CPU)
    assert random_sam3.detr_encoder.layers[0]._compiled_call_impl is None
