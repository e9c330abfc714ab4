"""Click adapters with random weights, written as training writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sam3lora.config.lora import LoraSettings
from sam3lora.model.adapter.metadata import CLICKS, CLICKS_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.clicks.adapter import ClickOrigin, add_click_lora, save_click_adapter
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase, load_base

TARGETS = ("q_proj", "v_proj", "output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head")


def write_click_adapter(
    folder: Path,
    base: Path,
    seed: int = 1,
    *,
    std: float = 0.2,
    vision_adapter: str | None = None,
    targets: tuple[str, ...] = TARGETS,
    dora: bool = False,
) -> Path:
    """Over a base folder; `vision_adapter` is the digest of the trunk that it says it was trained on."""
    return _write(folder, load_base(str(base)), seed, std, vision_adapter, targets, dora)


def write_click_adapters(root: Path, base: Path, over: Path) -> None:
    """Three of different weights: "edges", "holes" with DoRA, and "over-towers" on the trunk of an adapter."""
    loaded = load_base(str(base))
    digest = read_adapter_weights(over, loaded.model).trunk_digest
    _write(root / "edges", loaded, 1)
    _write(root / "holes", loaded, 2, dora=True)
    _write(root / "over-towers", loaded, 3, vision_adapter=digest)


def _write(
    folder: Path,
    loaded: LoadedBase,
    seed: int,
    std: float = 0.2,
    vision_adapter: str | None = None,
    targets: tuple[str, ...] = TARGETS,
    dora: bool = False,
) -> Path:
    head = load_click_head(loaded)
    origin = ClickOrigin(tracker_fingerprint=fingerprint(head), vision_adapter=vision_adapter)
    torch.manual_seed(seed)
    model = add_click_lora(head, LoraSettings(rank=2, alpha=4, target_modules=targets, use_dora=dora))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=std)
    metadata = AdapterMetadata(
        base_model=loaded.name,
        base_fingerprint=loaded.fingerprint,
        resolution=loaded.resolution,
        task=CLICKS,
        clicks=origin.model_dump(),
        format_version=CLICKS_FORMAT_VERSION,
    )
    return save_click_adapter(model, folder, metadata)
