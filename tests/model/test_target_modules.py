"""The modules, ranks and alphas of configurations: as PEFT finds them, and the same again when it loads an adapter."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.peft_config import read_config
from sam3lora.model.adapter.target_modules import ValuesByName, adapted_names, base_modules
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.components import adapted_modules

from .conftest import make_sam3, randomise_adapter

# Keys of patterns are in alphabetical order, in which PEFT writes them.
CASES = [
    {"target_modules": ["q_proj", "layers.0.mlp.fc1"]},
    {"target_modules": ["text_projection"], "exclude_modules": ["text_encoder.text_projection"]},
    {"target_modules": r".*decoder.*(self_attn|text_cross_attn).*(q|v)_proj$"},
    {"target_modules": r".*\.(q_proj|fc1)", "exclude_modules": r"vision_encoder\..*"},
    {"target_modules": "all-linear", "exclude_modules": ["vision_encoder", "out_proj"]},
    {"target_modules": ["fc1"], "layers_to_transform": [1]},
    {"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["fc1", "detr_encoder.layers.0.mlp.fc1"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "rank_pattern": {"^vision_encoder.*": 1, "q_proj": 3}},
    {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.*": 1, r"layers\.\d\.self_attn.q_proj": 4}},
    {"target_modules": ["q_proj"], "alpha_pattern": {".*decoder.*": 7, "self_attn.q_proj": 5}},
]


@pytest.mark.parametrize("fields", CASES, ids=range(len(CASES)))
def test_peft_and_both_readers_agree(tmp_path, fields):
    base = make_sam3()
    by_peft = get_peft_model(deepcopy(base), LoraConfig(r=2, **fields))
    randomise_adapter(by_peft, 1)
    folder = save_adapter(by_peft, tmp_path / "a")
    weights = read_adapter_weights(folder, base)
    loaded, _ = load_adapter(deepcopy(base), folder)
    assert tuple(weights.modules) == adapted_modules(by_peft) == adapted_modules(loaded)
    assert weights.modules
    for name, update in weights.modules.items():
        expected, again = (model.base_model.model.get_submodule(name) for model in (by_peft, loaded))
        assert update.rank == expected.r["default"] == again.r["default"]
        assert expected.scaling == again.scaling
        up = expected.lora_B["default"].weight.flatten(1) * expected.scaling["default"]
        torch.testing.assert_close(update.up, up.detach())
    # the configuration stays as it was read: a resumed training saves it again
    assert save_adapter(loaded, tmp_path / "b").is_dir()
    assert read_config(tmp_path / "b") == read_config(folder)


def test_all_linear_of_a_file_is_what_peft_makes_of_it():
    base = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Sequential(nn.Linear(2, 2)))
    model = get_peft_model(deepcopy(base), LoraConfig(target_modules="all-linear"))
    assert tuple(adapted_names(LoraConfig(target_modules="all-linear"), base_modules(base))) == adapted_modules(model)
    # a second adapter looks at the modules, not at the layers of the first
    assert list(base_modules(model.get_base_model())) == list(base_modules(base))


def test_the_first_key_that_matches_counts():
    values = ValuesByName({"b.c": 1, "^c": 2, ".*c": 3, "c": 4})
    assert [values.get(name, 0) for name in ("a.b.c", "c", "x.c", "cc", "d")] == [1, 2, 3, 3, 0]
    # a dot of a plain name is a dot, whatever `re` would make of it
    assert ValuesByName({"b.c": 1}).get("bxc", 0) == 0
