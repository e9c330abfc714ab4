"""Loading of click heads: from stock and doubled names, in other types and sizes; what is missing is told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sam3lora.errors import UserError
from sam3lora.model.clicks.loading import build_click_head, has_click_head, load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import load_base
from tests.model.clicks.video_checkpoint import write_video_checkpoint


@pytest.fixture
def copied(video_folder, stock_tracker, tmp_path):
    return shutil.copytree(video_folder, tmp_path / "copy")


def _change(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _load(folder):
    return load_click_head(load_base(str(folder)))


def test_the_detector_is_the_same_with_and_without_a_tracker(base):
    assert has_click_head(base.folder)
    assert base.fingerprint == load_base("tiny").fingerprint


def test_names_that_save_pretrained_doubles_are_read(head, tmp_path):
    write_video_checkpoint(tmp_path / "doubled", doubled_prefix=True)
    assert fingerprint(_load(tmp_path / "doubled")) == fingerprint(head)


def test_a_base_without_a_tracker_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config["detector_config"] | {"model_type": "sam3"}))
    _change(copied, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("tracker")])
    with pytest.raises(UserError, match="has no tracker"):
        _load(copied)


@pytest.mark.parametrize("name", ["tracker_model.mask_decoder.iou_token.weight", "tracker_model.no_memory_embedding"])
def test_a_missing_tensor_is_named(copied, name):
    _change(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=name.removeprefix("tracker_model.")):
        _load(copied)


def test_another_width_is_told(copied):
    _change(copied, lambda tensors: tensors.update({"tracker_model.no_memory_embedding": torch.zeros(1, 1, 32)}))
    with pytest.raises(UserError, match=r"no_memory_embedding .*\(1, 1, 32\)"):
        _load(copied)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("mask_decoder_config", "num_attention_heads", 0), ("prompt_encoder_config", "hidden_size", 48)],
)
def test_a_configuration_that_does_not_fit_is_told(copied, part, key, value):
    config = json.loads((copied / "config.json").read_text())
    config["tracker_config"][part][key] = value
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        _load(copied)


def test_places_stay_precise_in_bfloat16(video_folder, stock_tracker, head, features, pixels):
    base = load_base(str(video_folder), dtype="bfloat16")
    low = load_click_head(base)
    assert low.no_memory_embedding.dtype is torch.bfloat16
    points, labels = torch.tensor([[[61.0, 83.0]]]), torch.ones(1, 1, dtype=torch.int)
    with torch.no_grad():
        exact, _ = head._prompts(1, points, labels, None, None)
        found, _ = low._prompts(1, points, labels, None, None)
        tokens = base.model.vision_encoder.backbone(pixels.bfloat16()).last_hidden_state
        output = low.decode(low.embed(tokens[:1]), points_NK2=points, labels_NK=labels, multimask=True)
    # Only the learned part is rounded: a coordinate in bfloat16 would turn the phases.
    assert (exact - found).abs().max() < 0.02
    assert output.logits_NMmm.dtype is torch.float32
    assert output.logits_NMmm.isfinite().all()


def test_another_resolution_has_places_of_its_own(video_folder, stock_tracker):
    base = load_base(str(video_folder), resolution=336)
    head = load_click_head(base)
    assert (head.input_side, head.mask_side) == (336, 96)
    with torch.no_grad():
        tokens = base.model.vision_encoder.backbone(torch.zeros(1, 3, 336, 336)).last_hidden_state
        output = head.decode(head.embed(tokens), boxes_N4=torch.tensor([[1.0, 2, 300, 330]]), multimask=False)
    assert output.logits_NMmm.shape == (1, 1, 96, 96)


def test_the_head_of_the_real_size_has_12_million_parameters():
    from transformers import Sam3VideoConfig

    config = Sam3VideoConfig()

    class Folder:
        name, path, tracker_config = "full", None, config.tracker_config.to_dict()

    with torch.device("meta"):
        head = build_click_head(Folder, config.detector_config.vision_config, 1008)
    number = sum(one.numel() for one in head.parameters())
    assert 11.9e6 < number < 12.2e6
