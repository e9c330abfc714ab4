"""Every configuration that comes with the package loads, survives saving, and says how it is used."""

from __future__ import annotations

import pytest

from sam3lora.config import COMPONENTS, load_config, preset_names
from sam3lora.config.keys import known_keys
from sam3lora.config.loading import PRESETS_DIR
from sam3lora.config.root import Config


@pytest.mark.parametrize("name", preset_names())
def test_preset_says_how_it_is_used_and_survives_saving(name, tmp_path):
    config = load_config(name)
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config  # the config.yaml of a run folder has to mean what the run meant
    header = (PRESETS_DIR / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "Hardware: " in header
    assert f"sam3lora train {name}" in header
    # The example that a newcomer copies has to work.
    overrides = [word for word in header.split() if "=" in word and "." in word.partition("=")[0]]
    assert overrides
    load_config(name, overrides)


@pytest.mark.parametrize(
    ("name", "rank", "components"),
    [
        ("minimal", 4, {"vision_encoder"}),
        ("light", 16, {"detr_encoder", "detr_decoder", "mask_decoder"}),
        ("balanced", 16, {"vision_encoder", "mask_decoder"}),
        ("maximum", 32, {"vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder"}),
        ("full", 32, set(COMPONENTS) - {"text_encoder"}),
        ("production", 32, set(COMPONENTS) - {"text_encoder"}),
    ],
)
def test_preset_adapts_what_its_name_stands_for(name, rank, components):
    config = load_config(name)
    assert config.lora.rank == rank
    assert set(config.lora.components) == components


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
