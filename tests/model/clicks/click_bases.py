"""A small base with a random tracker that answers different clicks differently."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
