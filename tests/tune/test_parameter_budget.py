"""The number of trainable parameters, against what PEFT really makes."""

from __future__ import annotations

import pytest

from sam3lora.config import Config, load_config
from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import apply_lora, count_parameters
from sam3lora.model.parameter_counts import count_on_full_size
from sam3lora.tune.estimate.parameter_budget import count_trainable, meta_model


def as_peft_makes_it(config: Config) -> int:
    model = meta_model.__wrapped__(config.model.name, None, False)
    settings = config.lora.settings
    return count_parameters(apply_lora(model, settings, geometry_cls=config.model.geometry_cls)).trainable


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=3", "lora.use_rslora=true"],
        ["lora.target_modules=[qkv, proj, linear1]", "lora.apply_to_text_encoder=true"],
        ["lora.vision_last_layers=2", "lora.apply_to_geometry_encoder=true"],
        ["model.geometry_cls=false", "lora.target_modules=[q_proj, fc1]", "lora.apply_to_mask_decoder=false"],
        ["lora.target_modules=[q_proj, fc1, conv_layers, proj1, projection]"],  # convolutions, of 1 x 1, 3 x 3, 14 x 14
        ["lora.use_dora=true", "lora.rank=5", "lora.target_modules=[q_proj, fc1, conv_layers, proj1]"],
    ],
)
def test_the_count_is_that_of_peft_on_the_tiny_model(overrides):
    config = load_config("quick_test", overrides)
    assert count_trainable(config) == as_peft_makes_it(config) > 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["light", "full"])
def test_the_count_is_that_of_peft_on_the_full_size(preset):
    config = load_config(preset)
    counted = count_on_full_size(config.lora.settings)
    assert count_trainable(config) == counted.trainable


def test_rank_is_a_factor_and_nothing_is_changed(small_base):
    assert count_trainable(load_config("light")) == 1_015_808  # docs/parameters.md; known offline
    counts = [count_trainable(load_config("quick_test", [f"lora.rank={rank}"])) for rank in (8, 1, 8)]
    assert counts == [8 * counts[1], counts[1], counts[0]]
    model = meta_model("tiny", None, False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    # A folder is counted by its own shape.
    assert 0 < count_trainable(load_config("quick_test", [f"model.name={small_base}"])) < counts[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.target_modules=[nothing]"], "'nothing' matches no module"),
        (["lora.apply_to_scoring=true"], "none of the target modules"),
        (["lora.vision_last_layers=60"], "must be between 1 and 6"),
        (["model.name=someone/else", "model.local_files_only=true"], "'someone/else' cannot be read"),
    ],
)
def test_impossible_settings_are_explained(overrides, words):
    with pytest.raises(UserError, match=words):
        count_trainable(load_config("quick_test", overrides))
