"""Files that people have from SAM3_LoRA."""

from __future__ import annotations

import pytest

from sam3lora.config import load_config
from sam3lora.config.aliases import REFUSED_KEYS
from sam3lora.config.keys import known_keys
from sam3lora.errors import UserError

KNOWN = """
model:
  name: facebook/sam3
lora:
  rank: 32
  alpha: 64
  dropout: 0.1
  target_modules: [qkv, proj, out_proj, c_fc, c_proj, linear1, linear2, fc1]
  apply_to_vision_encoder: true
  apply_to_text_encoder: false
  apply_to_geometry_encoder: true
  apply_to_detr_encoder: true
  apply_to_detr_decoder: true
  apply_to_mask_decoder: true
training:
  data_dir: datasets/potholes
  batch_size: 8
  num_epochs: 100
  learning_rate: 5e-5
  weight_decay: 0.01
  num_negatives: 3
  gradient_accumulation_steps: 8
  warmup_steps: 200
  lr_scheduler: cosine
  max_grad_norm: 1.0
  mixed_precision: no
  adam_beta1: 0.9
  adam_beta2: 0.999
  adam_epsilon: 1e-8
  seed: 42
  logging_steps: 10
  eval_steps: 100
  save_steps: 100
  save_total_limit: 5
  num_workers: 2
output:
  output_dir: outputs/from_another_trainer
"""

WITHOUT_EFFECT = """
hardware:
  device: cuda
  dataloader_pin_memory: true
  use_compile: false
evaluation:
  metric: iou
  save_predictions: false
"""


def test_keys_that_act_load_unchanged(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(KNOWN)
    config = load_config(path)
    assert config.training.learning_rate == 5e-5
    assert config.training.adam_epsilon == 1e-8
    assert config.training.mixed_precision == "no"
    assert config.training.eval_steps == 100
    assert config.training.data_dir == "datasets/potholes"
    assert config.output.output_dir == "outputs/from_another_trainer"
    assert "geometry_encoder" in config.lora.components
    assert "qkv" in config.lora.target_modules


def test_missing_component_flags_are_false():
    config = load_config({"lora": {"apply_to_detr_decoder": True}})
    assert config.lora.components == ("detr_decoder",)


def test_keys_without_effect_are_refused_one_by_one(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(KNOWN + WITHOUT_EFFECT)
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "5 problems" in text
    assert "hardware.device has no effect here: write scaling.use_gpu" in text
    assert "evaluation.metric has no effect here: write evaluation.every_epochs" in text


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_refused_key_says_what_to_write(key):
    with pytest.raises(UserError) as caught:
        load_config("light", [f"{key}=x"])
    assert f"{key} has no effect here: {REFUSED_KEYS[key]}" in str(caught.value)


@pytest.mark.parametrize("value", ["x", "{}", "null", "{something: 1}"])
def test_unknown_hardware_settings_are_refused_too(value):
    with pytest.raises(UserError, match=r"hardware.* has no effect here"):
        load_config("light", ["model.name=tiny", f"hardware.anything={value}"])


def test_no_refused_key_exists():
    # A key cannot both act and be refused.
    assert not set(REFUSED_KEYS) & set(known_keys())


def test_advice_names_keys_that_exist():
    # "write training.x" has to be a key of ours.
    known = set(known_keys())
    for key, advice in REFUSED_KEYS.items():
        words = [word.strip("(),:;") for word in advice.split()]
        dotted = [w for w in words if "." in w and w.split(".")[0] in {"training", "scaling", "model", "evaluation"}]
        assert all(word in known for word in dotted), (key, dotted)
