"""Every configuration that comes with the package loads, survives saving, and says how it is used."""

from __future__ import annotations

import pytest

from sam3lora.config import load_config, preset_names
from sam3lora.config.keys import known_keys
from sam3lora.config.loading import PRESETS_DIR
from sam3lora.config.root import Config


def test_the_promised_presets_are_there():
    promised = {"quick_test", "minimal", "light", "balanced", "full", "maximum", "production", "demo"}
    assert promised == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_saved_preset_loads_as_the_same_configuration(name, tmp_path):
    # The config.yaml of a run folder has to mean what the run meant.
    config = load_config(name)
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config


@pytest.mark.parametrize("name", preset_names())
def test_preset_opens_with_its_command_an_override_and_the_hardware(name):
    header = [line for line in (PRESETS_DIR / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert name in text
    assert "Hardware: " in text
    assert any("=" in line and "sam3lora train" in line for line in header)


@pytest.mark.parametrize("name", preset_names())
def test_override_in_the_header_of_a_preset_is_valid(name):
    # The example a newcomer copies has to work.
    words = (PRESETS_DIR / f"{name}.yaml").read_text().split("\n\n")[0].split()
    overrides = [word for word in words if "=" in word and "." in word.partition("=")[0]]
    assert overrides
    load_config(name, overrides)


@pytest.mark.parametrize(
    ("name", "rank", "components"),
    [
        ("minimal", 4, {"vision_encoder"}),
        ("light", 16, {"detr_encoder", "detr_decoder", "mask_decoder"}),
        ("balanced", 16, {"vision_encoder", "mask_decoder"}),
        ("maximum", 32, {"vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder"}),
    ],
)
def test_preset_adapts_what_its_name_stands_for(name, rank, components):
    config = load_config(name)
    assert config.lora.rank == rank
    assert set(config.lora.components) == components


@pytest.mark.parametrize("name", ["full", "production"])
def test_full_presets_adapt_everything_but_the_text_encoder(name):
    config = load_config(name)
    assert "text_encoder" not in config.lora.components
    assert len(config.lora.components) == 6


@pytest.mark.parametrize("name", ["quick_test", "demo"])
def test_cpu_presets_need_neither_gpu_nor_download(name):
    config = load_config(name)
    assert config.model.name == "tiny"
    assert config.scaling.use_gpu is False
    assert config.training.mixed_precision == "no"


def test_default_output_folder_is_named_after_the_preset_or_file(tmp_path):
    own = tmp_path / "potholes.yaml"
    own.write_text("lora: {apply_to_mask_decoder: true}")
    assert load_config("light").output.output_dir == "outputs/light"
    assert load_config(own).output.output_dir == "outputs/potholes"


def test_every_key_has_a_description():
    for key in known_keys():
        model = Config
        *sections, leaf = key.split(".")
        for section in sections:
            model = model.model_fields[section].annotation
        assert model.model_fields[leaf].description, key
