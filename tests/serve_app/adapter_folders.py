"""Adapter folders that hold a number: enough for whoever looks at files and headers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.adapter.metadata import AdapterMetadata, write_metadata


def write_adapter(
    root: Path, adapter_id: str, value: float = 1.0, *, module: str = "detr_decoder.box_head.layer1", rank: int = 2
) -> Path:
    """A folder that replaces the one that is there, file by file; never the same file as before."""
    folder = root / adapter_id
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "target_modules": ["layer1"]}
    metadata = AdapterMetadata(prompts=[f"what {adapter_id} finds"], post_processing=PostProcessing(threshold=0.3))
    tensors = {f"base_model.model.{module}.lora_A.weight": np.full((rank, 4), value, np.float32)}
    scratch = folder / "scratch"
    save_file(tensors, scratch)
    os.replace(scratch, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_metadata(folder, metadata.to_dict())
    return folder
