"""Folders of dense models on a whole SAM 3, which has modules of the names that the trunk has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Sam3Model

from sam3lora.config.lora import LoraSettings
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import DENSE, AdapterMetadata
from sam3lora.model.dense.folder import load_dense, save_dense
from sam3lora.model.dense.model import DenseSam3
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import load_base
from sam3lora.model.staged.trunk import keep_trunk_only

from ..conftest import randomise_adapter, save_base, small_config

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@pytest.fixture
def deep_base(tmp_path) -> Path:
    """So many layers that PEFT shortens the names of their modules."""
    config = small_config()
    config.vision_config.backbone_config.num_hidden_layers = 4
    torch.manual_seed(0)
    return save_base(tmp_path / "base", Sam3Model(config).eval())


def test_lora_of_every_layer_is_of_the_trunk_alone(deep_base, tmp_path):
    base = load_base(str(deep_base))
    keep_trunk_only(base.model)
    sam3 = apply_lora(base.model, LoraSettings(rank=2, components=("vision_encoder",), target_modules=LINEARS))
    randomise_adapter(sam3)
    settings = DenseSettings(mode="binary", classes=("crack",), layers=(3,), width=32)
    model = DenseSam3(sam3, settings).eval()
    metadata = AdapterMetadata(task=DENSE, dense=settings.to_dict(), format_version=2)
    folder = save_dense(model, tmp_path / "best", metadata)
    loaded, _ = load_dense(load_base(str(deep_base)), folder)
    pixels = torch.rand(1, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), model(pixels))
    stock = PeftModel.from_pretrained(Sam3Model.from_pretrained(deep_base), folder)
    adapted = {name for name, _ in stock.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 4 * len(LINEARS)
    assert all(".vision_encoder.backbone." in name for name in adapted)
