"""Counts on the full-size model, and the presets' targets."""

from pathlib import Path

import pytest

from sam3lora.config import load_config, preset_names
from sam3lora.model.adapter.lora_layers import LoraSettings
from sam3lora.model.adapter.targets import select_modules
from sam3lora.model.parameter_counts import ParameterTable, count_on_full_size, main, render_markdown


@pytest.fixture(scope="module")
def vision_qv() -> ParameterTable:
    return count_on_full_size(LoraSettings(rank=8, target_modules=("q_proj", "v_proj")))


def test_full_size_counts(vision_qv):
    # By hand: 32 layers x 2 modules x rank 8 x (1024 + 1024); the published model has 840.4 M parameters.
    assert vision_qv.trainable == 32 * 2 * 8 * 2048
    assert vision_qv.modules_adapted == 64
    assert round(vision_qv.total / 1e6, 1) == 840.4
    assert vision_qv.percent == pytest.approx(0.125, abs=0.001)
    assert vision_qv.adapter_mb == pytest.approx(4.2, abs=0.01)


def test_markdown_shows_the_counts(vision_qv):
    # One row a preset, one column an adapted component.
    text = render_markdown({"minimal": vision_qv}, {"minimal": LoraSettings(rank=8)})
    assert "| minimal | 8 | 64 / 1,048,576 | 64 / 1,048,576 | 0.12 % | 4.2 |" in text
    assert "detr" not in text


@pytest.mark.parametrize("preset", preset_names())
def test_every_target_and_flag_of_a_preset_acts(preset, random_sam3):
    # select_modules refuses a target or a flag that matches nothing.
    config = load_config(preset)
    if config.task == "clicks" or (config.task == "dense" and config.dense.adapter != "lora"):
        return  # nothing of the Sam3Model is adapted
    lora = config.lora
    assert select_modules(random_sam3, lora.target_modules, components=lora.components)


@pytest.mark.slow
def test_documented_table_is_current(capsys):
    # docs/parameters.md is what the command writes today.
    main()
    assert capsys.readouterr().out == (Path(__file__).parents[2] / "docs" / "parameters.md").read_text()
