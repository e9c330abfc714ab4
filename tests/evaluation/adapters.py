"""Adapters that look trained, for a small base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base


def write_adapter(
    folder: Path, base: Path, *, seed: int | None = 0, components: tuple[str, ...] = ("detr_decoder",), **metadata: Any
) -> Path:
    """An adapter of random numbers that change every answer; without a seed, one that leaves the base as it is."""
    loaded = load_base(str(base))
    settings = LoraSettings(rank=2, components=components, target_modules=("v_proj", "o_proj", "fc1", "fc2"))
    model = apply_lora(loaded.model, settings)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    known = AdapterMetadata(base_model=str(base), base_fingerprint=loaded.fingerprint, **metadata)
    return save_adapter(model, folder, known)
