"""Dense folders that say something, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from sam3lora.config.lora import LoraSettings
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import DENSE, DENSE_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.dense.folder import save_dense
from sam3lora.model.dense.model import DenseSam3, chosen_layers
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import load_base
from sam3lora.model.staged.trunk import keep_trunk_only

from ..conftest import randomise_adapter

CLASSES = {"binary": ("crack",), "multiclass": ("background", "gear", "red bolt"), "multilabel": ("gear", "dirt")}


def write_dense(base: Path, folder: Path, mode: str = "multiclass", *, lora: bool = True, **settings) -> Path:
    """A folder on a base folder whose labels differ from place to place, as after training."""
    loaded = load_base(str(base))
    keep_trunk_only(loaded.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sam3 = loaded.model
        if lora:
            adapted = LoraSettings(rank=2, components=("vision_encoder",), target_modules=("q_proj", "fc1"))
            sam3 = apply_lora(loaded.model, adapted)
            randomise_adapter(sam3, 3)
        layers = chosen_layers("last", loaded.model.vision_encoder.backbone)
        values = {"mode": mode, "classes": CLASSES[mode], "layers": layers, "width": 32} | settings
        model = DenseSam3(sam3, DenseSettings(**values))
        for name, parameter in model.bottlenecks().items():
            if name.endswith("up.weight"):  # they begin by adding nothing
                parameter.data.normal_(std=0.5)
        for name, parameter in model.dense_head.outputs[0].named_parameters():
            parameter.data.normal_(std=1.0 if name == "weight" else 0.1)
    metadata = AdapterMetadata(
        base_model=str(base),
        base_fingerprint=loaded.fingerprint,
        resolution=loaded.resolution,
        lora={"rank": 2} if lora else {},
        task=DENSE,
        dense=model.settings.to_dict(),
        format_version=DENSE_FORMAT_VERSION,
    )
    return save_dense(model, folder, metadata)
