"""Values arrive as they were meant."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sam3lora.config import aliases, load_config
from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.tune.space.reader import load_space


def test_override_wins_over_the_file_and_the_later_over_the_earlier():
    assert load_config("light", ["lora.rank=4", "lora.rank=8"]).lora.rank == 8


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),  # YAML 1.1 reads 1e-4 as a word
        ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ("q_proj", "v_proj")),
        ("scaling.num_workers=[1, 4]", "scaling", "num_workers", (1, 4)),
        ("scaling.num_workers=0", "scaling", "num_workers", 0),
        ("scaling.use_gpu=auto", "scaling", "use_gpu", "auto"),
        ("training.mixed_precision=no", "training", "mixed_precision", "no"),  # not false
        ("logging.progress=off", "logging", "progress", "off"),
        ("logging.level=debug", "logging", "level", "DEBUG"),
        ("training.num_negatives=null", "training", "num_negatives", None),
        ("training.gradient_checkpointing=[vision_encoder]", "training", "gradient_checkpointing", ("vision_encoder",)),
        ("training.gradient_checkpointing=true", "training", "gradient_checkpointing", True),
        ("data.prompts.Type 0.5 mm=crack", "data", "prompts", {"Type 0.5 mm": "crack"}),  # dots in a category's name
        ("data.prompts.off=switch", "data", "prompts", {"off": "switch"}),
        ("data.categories=[yes, 12]", "data", "categories", ("yes", "12")),  # words stay words, numbers become them
        ("output.output_dir=runs/a=b", "output", "output_dir", "runs/a=b"),
    ],
)
def test_override_is_read_as_yaml(override, section, key, value):
    assert getattr(getattr(load_config("light", [override]), section), key) == value


def test_nested_override_keeps_its_neighbours():
    config = load_config("minimal", ["training.loss.mask=50"])
    assert config.training.loss.mask == 50
    assert config.training.loss.mask_resolution == "low"


def test_hard_words_survive_saving(tmp_path):
    # Texts that YAML reads as booleans, numbers, dates or nothing.
    words = ["no", "off", "true", "1e-4", "12", "null", "~", "2024-01-01", "a: b", "# c", "naïve 裂缝"]
    config = load_config({"lora": {"apply_to_scoring": True}, "data": {"negative_prompts": words}})
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config


def test_given_dict_is_left_alone():
    given = {"lora": {"rank": 4, "apply_to_mask_decoder": True}}
    load_config(given, ["lora.rank=8", "training.seed=1"])
    assert given == {"lora": {"rank": 4, "apply_to_mask_decoder": True}}


def test_configuration_cannot_be_changed_afterwards():
    config = load_config("light")
    with pytest.raises(ValidationError):
        config.lora.rank = 3


def test_empty_section_means_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("training:\nlora:\n  apply_to_mask_decoder: true\n")
    assert load_config(path).training.weight_decay == 0.01


def test_data_dir_is_required_only_where_it_is_used(tmp_path):
    config = load_config("light")
    with pytest.raises(UserError, match="--data-dir"):
        config.training.required_data_dir()
    missing = load_config("light", [f"training.data_dir={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="no folder"):
        missing.training.required_data_dir()
    assert load_config("light", [f"training.data_dir={tmp_path}"]).training.required_data_dir() == tmp_path


ADAPTED = {"lora": {"apply_to_scoring": True}}
RANKS = {"lora.rank": {"choice": [4, 8]}}


@pytest.mark.parametrize("old", sorted(aliases.RENAMED_KEYS))
def test_renamed_key_keeps_its_meaning(old, tmp_path):
    section, _, name = old.partition(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"lora: {{apply_to_scoring: true}}\n{section}: {{{name}: 0.2}}\n")
    loaded = {
        "file": load_config(path),
        "override": load_config("light", [f"{old}=0.2"]),
        "override of the section": load_config("light", [f"{section}={{{name}: 0.2}}"]),
        "override of an old key in the file": load_config({**ADAPTED, section: {name: 0.9}}, [f"{old}=0.2"]),
        "set of a sweep": load_space({"base": "light", "set": {old: 0.2}, "parameters": RANKS}).base,
        "changed": load_config("light").changed({old: 0.2}),
    }
    assert {where: config.evaluation.threshold for where, config in loaded.items()} == dict.fromkeys(loaded, 0.2)


def test_new_name_as_an_override_replaces_the_old_name_of_the_file():
    old = {**ADAPTED, "evaluation": {"prob_threshold": 0.9}}
    assert load_config(old, ["evaluation.threshold=0.2"]).evaluation.threshold == 0.2
    assert old["evaluation"] == {"prob_threshold": 0.9}


def test_post_processing_is_that_of_the_evaluation_section():
    given = {"threshold": 0.2, "nms": "box", "nms_iou": 0.5, "prompt_thresholds": {"crack": 0.4}}
    config = load_config({**ADAPTED, "evaluation": {**given, "num_samples": 3}})
    assert config.evaluation.post_processing == PostProcessing(**given)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("qkv", {"q_proj", "k_proj", "v_proj"}),
        ("proj", {"o_proj", "out_proj"}),
        ("out_proj", {"o_proj", "out_proj"}),  # o_proj everywhere but in the text tower
        ("c_fc", {"fc1"}),
        ("linear1", {"fc1"}),
        ("c_proj", {"fc2"}),
        ("linear2", {"fc2"}),
        ("box_head", {"box_head"}),
    ],
)
def test_module_alias(given, needed):
    assert set(aliases.resolve_target_modules([given])) == needed
