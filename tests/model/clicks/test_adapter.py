"""Click adapters: what they change, where they fit, and what is told where they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Sam3VideoModel

from sam3lora.config import load_config
from sam3lora.config.lora import LoraSettings
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import load_adapter
from sam3lora.model.adapter.lora_layers import apply_lora, save_adapter
from sam3lora.model.adapter.metadata import CLICKS, CLICKS_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.clicks.adapter import (
    ClickOrigin,
    add_click_lora,
    add_vision_adapter,
    load_click_adapter,
    read_click_metadata,
    save_click_adapter,
)
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.components import adapted_modules
from sam3lora.model.dense.folder import read_dense_metadata
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import load_base
from tests.model.clicks.click_bases import write_click_base

TARGETS = ("q_proj", "output_hypernetworks_mlps")
CLICK = {"points_NK2": torch.tensor([[[40.0, 60.0]]]), "labels_NK": torch.ones(1, 1, dtype=torch.int)}


@pytest.fixture(scope="module")
def click_folder(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_click_base(tmp_path_factory.mktemp("clicks") / "base", small_base)


@pytest.fixture(scope="module")
def click_base(click_folder):
    return load_base(str(click_folder))


def random_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def saved(click_base, tmp_path_factory):
    """The folder of an adapter that has learned something, and its head with LoRA layers beside the weights."""
    head = load_click_head(click_base)
    origin = ClickOrigin(tracker_fingerprint=fingerprint(head))
    torch.manual_seed(1)
    model = add_click_lora(head, LoraSettings(rank=2, alpha=4, target_modules=TARGETS))
    random_lora(model)
    metadata = AdapterMetadata(
        base_model=click_base.name,
        base_fingerprint=click_base.fingerprint,
        resolution=click_base.resolution,
        task=CLICKS,
        clicks=origin.model_dump(),
        format_version=CLICKS_FORMAT_VERSION,
    )
    return save_click_adapter(model, tmp_path_factory.mktemp("saved") / "best", metadata), head.eval()


@pytest.fixture(scope="module")
def tokens(click_base):
    pixels = torch.randn(1, 3, click_base.resolution, click_base.resolution, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return click_base.model.vision_encoder.backbone(pixels).last_hidden_state


@torch.no_grad()
def masks(head, tokens) -> torch.Tensor:
    return head.decode(head.embed(tokens), **CLICK, multimask=True).logits_NMmm


def test_merged_head_is_the_trained_one_and_the_base_stays(saved, click_base, tokens):
    folder, trained = saved
    plain = load_click_head(click_base)
    before, identity = masks(plain, tokens), fingerprint(plain)
    merged = load_click_adapter(folder, click_base, head=plain)
    torch.testing.assert_close(masks(merged, tokens), masks(trained, tokens), rtol=1e-4, atol=1e-4)
    assert (masks(merged, tokens) - before).abs().max() > 0.1
    assert torch.equal(masks(plain, tokens), before)
    assert fingerprint(plain) == fingerprint(trained) == identity
    # All but the decoder is the base's own, so features of images serve both.
    own = {id(one) for one in merged.parameters()} - {id(one) for one in plain.parameters()}
    assert own == {id(one) for one in merged.mask_decoder.parameters()}
    for ours, theirs in zip(merged.embed(tokens).tensors(), plain.embed(tokens).tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_names_are_those_of_a_stock_video_model(saved, click_folder):
    folder, head = saved
    stock = Sam3VideoModel.from_pretrained(click_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, str(folder))
    names = adapted_modules(adapted)
    assert len(names) == 7 + 4 * 3
    assert all(name.startswith("tracker_model.mask_decoder.") for name in names)
    decoder = adapted.get_base_model().tracker_model.mask_decoder
    for name, parameter in head.mask_decoder.named_parameters():
        torch.testing.assert_close(decoder.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("preset", ["clicks", "clicks_quick_test"])
def test_targets_of_presets_are_in_the_decoder(preset, click_base):
    settings = load_config(preset).lora.settings
    assert len(adapted_modules(add_click_lora(load_click_head(click_base), settings))) == 32


@pytest.mark.parametrize(
    ("targets", "words"),
    [(("fc1",), "matches no module"), (("conv_s0",), "conv_s0"), (("mask_decoder",), "features of images")],
)
def test_what_cannot_be_adapted_is_told(targets, words, click_base):
    with pytest.raises(UserError, match=words):
        add_click_lora(load_click_head(click_base), LoraSettings(rank=2, target_modules=targets))


def changed(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "sam3lora.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def cut(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(base_fingerprint="0" * 64), "was trained on the base"),
        (changed(clicks={"tracker_fingerprint": "0" * 64}), "another click head"),
        (changed(resolution=1008), "resolution 1008"),
        (changed(task="detection", clicks=None), "no click adapter"),
        (changed(clicks={"tracker": 1}), "tracker_fingerprint"),
        (changed(clicks=None), "sam3lora.json"),
        (lambda folder: (folder / "sam3lora.json").unlink(), "no click adapter"),
        (cut, "adapter_model"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(change, words, saved, click_base, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=words) as told:
        load_click_adapter(folder, click_base)
    assert "\n" not in str(told.value)


def test_an_adapter_belongs_to_the_trunk_that_it_was_trained_on(saved, click_folder, tmp_path):
    base = load_base(str(click_folder))
    model = apply_lora(base.model, LoraSettings(rank=2, target_modules=("q_proj",), components=("vision_encoder",)))
    torch.manual_seed(3)
    random_lora(model.eval())
    trunk = save_adapter(model, tmp_path / "trunk", AdapterMetadata(base_fingerprint=base.fingerprint))
    digest = read_adapter_weights(trunk, load_base(str(click_folder)).model).trunk_digest
    assert digest is not None
    other = load_base(str(click_folder))
    assert add_vision_adapter(other, trunk) == digest
    pixels = torch.randn(1, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():  # the trunk of the two is the same, and not the base's
        ours, theirs = (one.model.vision_encoder.backbone(pixels).last_hidden_state for one in (other, base))
        plain = load_base(str(click_folder)).model.vision_encoder.backbone(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3

    folder = shutil.copytree(saved[0], tmp_path / "over")
    origin = json.loads((folder / "sam3lora.json").read_text())["clicks"]
    changed(clicks=origin | {"vision_adapter": digest})(folder)
    base = load_base(str(click_folder))
    load_click_adapter(folder, base, vision_adapter=digest)
    for one, seen in ((folder, None), (saved[0], digest), (folder, "1" * 64)):
        with pytest.raises(UserError, match="vision trunk"):
            load_click_adapter(one, base, vision_adapter=seen)


def test_an_adapter_that_leaves_the_trunk_has_no_digest(small_base, tmp_path):
    base = load_base(str(small_base))
    model = apply_lora(base.model, LoraSettings(rank=2, target_modules=("q_proj",), components=("detr_decoder",)))
    folder = save_adapter(model, tmp_path / "decoder", AdapterMetadata(base_fingerprint=base.fingerprint))
    with pytest.raises(UserError, match="leaves the vision trunk as it is"):
        add_vision_adapter(load_base(str(small_base)), folder)


def test_other_tasks_refuse_a_click_adapter(saved, click_base):
    folder, _ = saved
    for use in (
        lambda: load_adapter(click_base.model, folder),
        lambda: read_adapter_weights(folder, click_base.model),
        lambda: read_dense_metadata(folder),
    ):
        with pytest.raises(UserError, match=r"of task clicks.*validate --clicks"):
            use()
    metadata, origin = read_click_metadata(folder)
    assert metadata.base_fingerprint == click_base.fingerprint
    assert origin.vision_adapter is None
    assert "tracker_model" in json.dumps(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    assert "click_adapter=" in (folder / "README.md").read_text()
