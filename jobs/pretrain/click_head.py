"""The tiny base's click head: its sizes, its first weights, and the folder of both halves of the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Sam3TrackerVideoConfig, Sam3VideoConfig
from transformers.models.sam3_tracker.configuration_sam3_tracker import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
)

from sam3lora.model.base_folder import BaseFolder, read_tensors
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.clicks.loading import NECK, TRACKER
from sam3lora.model.loading import LoadedBase

DETECTOR = "detector_model."
_WIDTH = 64
_PROMPTS: dict[str, Any] = {"hidden_size": _WIDTH, "patch_size": 14, "mask_input_channels": 16}
_DECODER: dict[str, Any] = {"hidden_size": _WIDTH, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64}


def tracker_config(detector_config: dict[str, Any]) -> Sam3TrackerVideoConfig:
    """A tracker of width 64 over the detector's trunk. Of its memory there are sizes, but no weights."""
    vision = detector_config["vision_config"]
    config = Sam3TrackerVideoConfig(
        vision_config=vision,
        prompt_encoder_config=_PROMPTS,
        mask_decoder_config=_DECODER,
        memory_attention_hidden_size=_WIDTH,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=256,
        memory_encoder_hidden_size=_WIDTH,
        memory_encoder_output_channels=16,
        mask_downsampler_embed_dim=_WIDTH,
        memory_fuser_embed_dim=_WIDTH,
        memory_fuser_intermediate_dim=256,
    )
    config.image_size = vision["backbone_config"]["image_size"]
    return config


def first_click_head(base: LoadedBase, tokens_ISC: Tensor) -> ClickHead:
    """A click head with a copy of the detector's neck, and random weights that learn.

    Args:
        tokens_ISC: Tokens of some images after the trunk: the neck's maps are scaled to a standard deviation of 1 on
            them, and so are embeddings of masks. With what random weights make of it a mask is too faint beside the
            image, and is never learned to be read.
    """
    prompts = Sam3TrackerPromptEncoderConfig(**_PROMPTS, image_size=base.resolution)
    vision: Any = base.model.config.vision_config
    head = ClickHead(vision, prompts, Sam3TrackerMaskDecoderConfig(**_DECODER))
    head.neck.load_state_dict(base.model.vision_encoder.neck.state_dict())
    for name, module in head.named_modules():
        if name.startswith("neck."):
            continue
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        encoder = head.prompt_encoder
        encoder.shared_embedding.positional_embedding.copy_(head.shared_image_embedding.positional_embedding)
        side = base.resolution // base.patch_size
        tokens_ICHW = tokens_ISC.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        for layer in list(head.neck.fpn_layers)[:3]:
            _divide(layer.proj2, layer(tokens_ICHW).std())
        blocks = torch.randn(8, 1, 4, 4).sign().repeat_interleave(side, 2).repeat_interleave(side, 3)
        _divide(encoder.mask_embed.conv3, encoder.mask_embed(8 * blocks).std())
    return head


def _divide(convolution: Any, factor: Tensor) -> None:
    for parameter in convolution.parameters():
        parameter.div_(factor)


def save_both_halves(detector: BaseFolder, head: ClickHead, folder: Path) -> None:
    """Write a `sam3_video` checkpoint in float16: the files of a base, its detector, and the click head.

    Args:
        folder: Created, or overwritten file by file.
    """
    shutil.copytree(detector.path, folder, dirs_exist_ok=True)
    config = Sam3VideoConfig(
        detector_config=detector.config,
        tracker_config=tracker_config(detector.config).to_dict(),
        low_res_mask_size=head.mask_side,
    )
    values = config.to_dict() | {"architectures": ["Sam3VideoModel"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    tensors = {
        name if name.startswith(DETECTOR) else DETECTOR + name: tensor
        for name, tensor in read_tensors(detector.path, ("",)).items()
        if not name.startswith((NECK, TRACKER))
    }
    for name, tensor in head.state_dict().items():
        tensors[NECK + name.removeprefix("neck.") if name.startswith("neck.") else TRACKER + name] = tensor
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
