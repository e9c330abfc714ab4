"""The tiny SAM 3's architecture with random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Sam3Model

from jobs.pretrain.tiny_model import initialise, save_tiny, tiny_config, write_tokenizer
from sam3lora.model.loading import LoadedBase, load_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    """Read only."""
    words = tmp_path_factory.mktemp("tokenizer")
    vocab_size = write_tokenizer(words, ["gear", "arrow", "bolt", "capsule"])
    torch.manual_seed(0)
    model = Sam3Model(tiny_config(vocab_size)).eval()
    initialise(model)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_tiny(model, words, folder)
    return load_base(str(folder))
