"""Small runs without Ray: a random SAM 3 of 112 pixels, a handful of drawn images, every component adapted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Sam3Model

from sam3lora.config import Config
from sam3lora.data.synth.dataset import write_dataset

from .short_runs import short_run

TARGETS = ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "box_head", "instance_projection", "text_proj", "query_proj"]
COMPONENTS = ("vision_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder", "scoring")

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 6 training and 3 validation images; read only."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    return write_dataset(folder, num_train=6, num_valid=3, size=112, seed=4, progress=False)


@pytest.fixture(scope="session")
def lively_base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_base` with weights large enough that an adapter can learn something; read only."""
    folder = tmp_path_factory.mktemp("lively") / "sam3"
    shutil.copytree(small_base, folder)
    model = Sam3Model.from_pretrained(folder)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    decoder = model.detr_decoder
    nn.init.normal_(decoder.query_embed.weight, std=0.5)
    nn.init.normal_(decoder.box_head.layer3.weight, std=0.02)
    decoder.reference_points.weight.data.uniform_(-1.5, 1.5)[:, 2:].sub_(1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(lively_base: Path, scenes: Path, tmp_path: Path) -> MakeConfig:
    """A configuration of a short run in this process, without dropout, with changes ``a.b=c``."""

    def make(*overrides: str, output: str = "run", **training: Any) -> Config:
        lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": TARGETS}
        lora |= {f"apply_to_{component}": True for component in COMPONENTS}
        own = {"learning_rate": 2e-3, "num_negatives": 1, "loss": {"mask_resolution": "low"}} | training
        return short_run(lively_base, scenes, tmp_path / output, *overrides, lora=lora, training=own)

    return make
