"""A small `sam3_video` checkpoint with random weights, as transformers lays it out: detector and tracker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

from sam3lora.model.base_folder import read_tensors
from sam3lora.model.tiny import TINY_FOLDER


def tracker_config(detector: dict, resolution: int = 224) -> Sam3TrackerVideoConfig:
    """A tracker of the detector's width on its trunk."""
    vision = detector["vision_config"]
    width = vision["fpn_hidden_size"]
    config = Sam3TrackerVideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": width, "patch_size": 14},
        mask_decoder_config={"hidden_size": width, "mlp_dim": 96, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=16,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=32,
    )
    config.image_size = resolution
    return config


def write_video_checkpoint(
    folder: Path,
    seed: int = 0,
    doubled_prefix: bool = False,
    source: Path = TINY_FOLDER,
    change: Callable[[Sam3TrackerVideoModel], object] = lambda tracker: None,
) -> Sam3TrackerVideoModel:
    """Write the detector of a base folder with a random tracker; returns the stock video tracker over its trunk.

    Args:
        change: What is done to the random weights.
    """
    shutil.copytree(source, folder)
    stored = json.loads((folder / "config.json").read_text())
    detector = stored.get("detector_config", stored)
    torch.manual_seed(seed)
    config = tracker_config(detector, detector["vision_config"]["backbone_config"]["image_size"])
    tracker = Sam3TrackerVideoModel(config).eval()
    change(tracker)
    with torch.no_grad():
        tracker.no_memory_embedding.normal_()
        tracker.prompt_encoder.shared_embedding.positional_embedding.copy_(
            tracker.shared_image_embedding.positional_embedding
        )
    tensors = {
        name.removeprefix("detector_model."): tensor
        for name, tensor in read_tensors(source, ("",)).items()
        if not name.startswith("tracker_")
    }
    trunk = {name: one.float() for name, one in tensors.items() if name.startswith("vision_encoder.backbone.")}
    assert not tracker.load_state_dict(trunk, strict=False).unexpected_keys
    prefix = "tracker_model.tracker_model." if doubled_prefix else "tracker_model."
    written = {f"detector_model.{name}": one for name, one in tensors.items()}
    for name, one in tracker.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            written["tracker_neck." + name.removeprefix("vision_encoder.neck.")] = one
        elif not name.startswith("vision_encoder."):
            written[prefix + name] = one
    for file in folder.glob("model*"):
        file.unlink()
    save_file({name: one.contiguous().clone() for name, one in written.items()}, folder / "model.safetensors")
    stored = {"model_type": "sam3_video", "detector_config": detector, "tracker_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(stored))
    return tracker
