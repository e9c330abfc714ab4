"""A small base with a random tracker that answers different clicks differently, and adapters of click heads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sam3lora.config.lora import LoraSettings
from sam3lora.model.adapter.metadata import CLICKS, CLICKS_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.clicks.adapter import add_click_lora, save_click_adapter
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import load_base
from tests.model.clicks.video_checkpoint import write_video_checkpoint


def write_click_base(folder: Path, detector_folder: Path) -> Path:
    """Write the detector with a tracker whose weights are large enough that an adapter can learn something."""
    write_video_checkpoint(folder, source=detector_folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith("tracker_") and name.endswith(".weight") and tensor.dim() > 1:
            torch.nn.init.xavier_uniform_(tensor)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_click_adapter(
    folder: Path, base: Path | str, *, vision_adapter: str | None = None, seed: int = 0, std: float = 1.0
) -> Path:
    """A click adapter whose random weights change the masks; `vision_adapter` is a `trunk_digest`."""
    loaded = load_base(str(base))
    head = load_click_head(loaded)
    clicks = {"tracker_fingerprint": fingerprint(head), "vision_adapter": vision_adapter}
    model = add_click_lora(head, LoraSettings(rank=2, target_modules=("output_hypernetworks_mlps",)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
    known = AdapterMetadata(
        base_model=str(base),
        base_fingerprint=loaded.fingerprint,
        task=CLICKS,
        clicks=clicks,
        format_version=CLICKS_FORMAT_VERSION,
    )
    return save_click_adapter(model, folder, known)
