"""What a person reads after a mistake."""

from __future__ import annotations

import pytest

from sam3lora.config import load_config
from sam3lora.errors import UserError


def message(source="light", *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def test_nothing_adapted_is_an_error():
    # The empty configuration: missing flags are false, and a run that trains nothing is a mistake.
    assert "apply_to_vision_encoder" in message({})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lora.ranks", "lora.rank"),  # a slip
        ("training.batchsize", "training.batch_size"),
        ("training.rank", "lora.rank"),  # a right name in the wrong section
        ("training.lr", "training.learning_rate"),  # a usual short name
        ("training.loss.masc", "training.loss.mask"),  # two levels down
        ("lora.apply_to_detr_decode", "lora.apply_to_detr_decoder"),
    ],
)
def test_unknown_key_names_the_nearest(wrong, meant):
    assert f"{wrong}: unknown key; did you mean {meant}?" in message("light", f"{wrong}=1")


def test_unknown_section_names_the_nearest():
    assert "trainings: unknown section; did you mean training?" in message({"trainings": {"seed": 1}})


def test_key_that_resembles_nothing_lists_its_section():
    text = message("light", "output.zzzz=1")
    assert "output.zzzz: unknown key" in text
    assert "output_dir" in text


def test_all_mistakes_are_listed_together():
    # Unknown, refused, out of range and of the wrong type: one round of fixing is enough.
    text = message(
        {
            "lora": {"rank": 0, "alpah": 3, "apply_to_vision_encoder": True},
            "training": {"batch_size": "many", "dropout": 0.5},
            "hardware": {"device": "cuda"},
        }
    )
    assert "5 problems" in text
    for part in (
        "lora.rank should be greater than or equal to 1, got 0",
        "did you mean lora.alpha?",
        "training.batch_size should be a whole number of at least 1, or \"auto\", got 'many'",
        "training.dropout: unknown key; did you mean lora.dropout?",
        "hardware.device has no effect here",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "names",
    [("prob_threshold", "threshold"), ("prob_threshold", "detection_threshold"), ("threshold", "detection_threshold")],
)
def test_setting_under_two_names_is_an_error_that_names_both(names):
    text = message({"lora": {"apply_to_scoring": True}, "evaluation": dict.fromkeys(names, 0.3)})
    assert all(f"evaluation.{name}" in text for name in names)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora.rank=true", "lora.rank should be a number, got True"),  # not rank 1
        ("lora.rank=1.5", "lora.rank should be a valid integer, got 1.5"),
        ("lora.alpha=.nan", "lora.alpha should be a finite number"),
        ("training.learning_rate=-1e-4", "training.learning_rate should be greater than 0, got -0.0001"),
        ("lora.target_modules=q_proj", "lora.target_modules should be a list, got 'q_proj'"),
        ("lora.target_modules=[]", "lora.target_modules"),
        ("training.loss=3", "training.loss should be a section"),
        ("training.lr_scheduler=linear", "write cosine"),
        ("training.mixed_precision=fp16", "write bf16"),
        ("training.gradient_checkpointing=[head]", "vision_encoder"),
        ("training.component_learning_rates.head=1e-4", '"head"'),
        ("scaling.num_workers=[3, 1]", "1 <= min <= max, got [3, 1]"),
        ("scaling.num_workers=true", "got True"),
        ("scaling.use_gpu=maybe", 'should be "auto", true or false'),
        ("scaling.resources_per_worker={CPU: -1}", "CPU has -1"),
        ("data.negative_prompts=[car, car]", '"car" twice'),
        ("data.categories=['']", "empty"),
    ],
)
def test_wrong_value_names_key_bound_and_value(override, part):
    assert part in message("light", override)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        # A setting that cannot act in this combination is refused, and the way out is named.
        (["lora.vision_last_layers=4"], "set it to true"),
        (["training.component_learning_rates.vision_encoder=1e-5"], "lora.apply_to_vision_encoder"),
        (["training.loss.num_points=64"], 'set it to "points"'),
        (["training.one_to_many=false", "training.loss.o2m=1"], "one_to_many"),
        (["model.dtype=bfloat16", "training.mixed_precision=no"], "mixed_precision bf16"),
        (["data.exhaustive=false", "training.num_negatives=5"], "negative_prompts"),
        (["data.exhaustive=[]"], "write false"),
        (["data.exhaustive=[crack, crack]"], "twice"),
        (["data.categories=[crack]", "data.exhaustive=[hole]"], '"hole"'),
        (["data.categories=[crack]", "data.prompts.hole=pothole"], '"hole"'),
    ],
)
def test_setting_without_effect_is_refused(overrides, part):
    assert part in message("light", *overrides)


@pytest.mark.parametrize("override", ["lora.rank", "=8", "lora.=8", "lora=8", "rank=8", "lora.rank=[8"])
def test_malformed_override_is_named(override):
    assert override in message("light", override)


def test_misspelt_preset_names_the_nearest():
    assert 'did you mean "balanced"?' in message("balansed")


def test_missing_file_names_its_path_and_the_presets(tmp_path):
    text = message(tmp_path / "none.yaml")
    assert "none.yaml" in text
    assert "balanced" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe\x00\x80", "cannot be read as a text file"),
        ("lora: [", "line 1"),  # broken YAML
        ("lora:\n  rank: 4\n  rank: 8\n", 'line 3, column 3: not valid YAML: the key "rank" is written twice'),
        ("- lora", "expected sections"),  # YAML of another shape
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),  # no objects from a file
        ("training: {seed: 2020-99-99}", "not valid YAML"),  # no such date
        ("lora: {rank: !!int four}", "not valid YAML"),
        ("lora: " + "[" * 2000 + "]" * 2000, "nested too deep"),
    ],
)
def test_file_that_is_no_configuration(tmp_path, content, part):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(path)
    assert part in text
    assert "broken.yaml" in text
    assert "is a folder" in message(tmp_path)
