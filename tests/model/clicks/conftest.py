"""A random `sam3_video` checkpoint, its base, its click head, and the stock video tracker of the same weights."""

from __future__ import annotations

import pytest
import torch

from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.loading import load_base
from tests.model.clicks.video_checkpoint import write_video_checkpoint


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video") / "base"


@pytest.fixture(scope="session")
def stock_tracker(video_folder):
    return write_video_checkpoint(video_folder)


@pytest.fixture(scope="session")
def base(video_folder, stock_tracker):
    return load_base(str(video_folder))


@pytest.fixture(scope="session")
def head(base):
    return load_click_head(base)


@pytest.fixture(scope="session")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def features(base, head, pixels):
    with torch.no_grad():
        return head.embed(base.model.vision_encoder.backbone(pixels).last_hidden_state)
