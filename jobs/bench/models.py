"""The models that benchmarks run on: configurations of SAM 3 filled with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import Sam3Config, Sam3Model

from jobs.pretrain.tiny_model import tiny_config
from sam3lora.errors import UserError


def small_config() -> Sam3Config:
    """A SAM 3 for a CPU whose stages take the shares of time that those of `facebook/sam3` take.

    336 pixels; a ViT of width 640 and 28 layers beside a detector of width 128 and 6 + 6 layers. One prompt on one
    image, float32 on a CPU: vision 87 % of the time, text 1 %, everything after it 12 %; `facebook/sam3`: 88, 1 and
    11 %. The prompts are encoded from 32 tokens, and there are 200 object queries, as there.
    """
    side, patch_size = 336, 14
    grid = side // patch_size
    detector = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 1024, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 640,
                "intermediate_size": 2560,
                "num_hidden_layers": 28,
                "num_attention_heads": 10,
                "image_size": side,
                "pretrain_image_size": side,
                "patch_size": patch_size,
                "window_size": grid // 2,
                "global_attn_indexes": [6, 13, 20, 27],
            },
            "fpn_hidden_size": 128,
            "backbone_feature_sizes": [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
        },
        text_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "projection_dim": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
        },
        geometry_encoder_config=detector | {"num_layers": 1},
        detr_encoder_config=detector | {"num_layers": 6},
        detr_decoder_config=detector | {"num_layers": 6, "num_queries": 200},
        mask_decoder_config={"hidden_size": 128, "num_attention_heads": 8},
    )


def narrow_config() -> Sam3Config:
    """As many layers and object queries as `facebook/sam3` has, in a width of 32 on 112 pixels.

    A forward or a training step starts the kernels that the full model starts, and takes a second on a CPU.
    """
    grid, patch_size = 8, 14
    detector = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "image_size": grid * patch_size,
                "pretrain_image_size": grid * patch_size // 2,
                "window_size": grid // 2,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 32,
            "num_attention_heads": 2,
            "vocab_size": 1000,
            "bos_token_id": 998,
            "eos_token_id": 999,
            "pad_token_id": 999,
        },
        geometry_encoder_config=detector,
        detr_encoder_config=detector,
        detr_decoder_config=detector,
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )


FULL_SIZE = "facebook/sam3"

CONFIGS: dict[str, Callable[[], Sam3Config]] = {
    "tiny": partial(tiny_config, vocab_size=1000),
    "small": small_config,
    "narrow": narrow_config,
    FULL_SIZE: Sam3Config,
}


def random_model(
    name: str, *, device: torch.device | str = "cpu", seed: int = 0, resolution: int | None = None
) -> Sam3Model:
    """A frozen model with random weights, the same ones for the same seed and device; in its own size by default.

    Raises:
        UserError: No such configuration.
    """
    if name not in CONFIGS:
        raise UserError(f"model must be one of {', '.join(CONFIGS)}, got {name!r}")
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if resolution is not None:
        config.image_size = resolution
    with torch.device(device):
        return Sam3Model(config).eval().requires_grad_(False)
