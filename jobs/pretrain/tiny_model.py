"""How the built-in tiny SAM 3 is made: configuration, initial weights, tokenizer, and the folder it is saved in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import Sam3Config, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder

IMAGE_SIZE, PATCH_SIZE, CONTEXT = 224, 14, 32


def tiny_config(vocab_size: int) -> Sam3Config:
    """About 2.6 M parameters: a 6-layer ViT of width 128 on 16 x 16 patches and a detector of width 64."""
    grid = IMAGE_SIZE // PATCH_SIZE
    detector = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 192, "dropout": 0.0}
    return Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "window_size": grid // 2,
                "global_attn_indexes": [2, 5],
                "pretrain_image_size": IMAGE_SIZE,
            },
            "fpn_hidden_size": 64,
            "backbone_feature_sizes": [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
        },
        text_config={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
            "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        geometry_encoder_config=detector | {"num_layers": 1},
        detr_encoder_config=detector | {"num_layers": 2},
        detr_decoder_config=detector | {"num_layers": 3, "num_queries": 32},
        mask_decoder_config={"hidden_size": 64, "num_attention_heads": 4},
    )


def initialise(model: Sam3Model) -> None:
    """Random weights that learn at these widths: the stock 0.02 is too small, and boxes must start spread out."""
    depth = {"vision_encoder": 6, "text_encoder": 2, "detr_encoder": 2, "detr_decoder": 3, "geometry_encoder": 1}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("o_proj", "out_proj", "fc2")):
                with torch.no_grad():
                    module.weight /= math.sqrt(2 * depth.get(name.split(".")[0], 1))
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    backbone = model.vision_encoder.backbone
    with torch.no_grad():
        backbone.embeddings.position_embeddings.copy_(0.5 * _sine_grid(IMAGE_SIZE // PATCH_SIZE, 128))
        decoder = model.detr_decoder
        nn.init.normal_(decoder.query_embed.weight, std=0.5)
        nn.init.normal_(decoder.presence_token.weight, std=0.5)
        nn.init.zeros_(cast(nn.Linear, decoder.box_head.layer3).weight)
        decoder.reference_points.weight.copy_(torch.logit(_spread_boxes(decoder.query_embed.num_embeddings)))
    _fit_box_attention(decoder)


def _sine_grid(side: int, width: int) -> torch.Tensor:
    """2D sine position embeddings (1, side * side, width)."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return grid.reshape(1, side * side, width)


def _spread_boxes(count: int) -> torch.Tensor:
    """Boxes (count, 4) of side 0.25 whose centres fill the image evenly (the R2 low-discrepancy sequence)."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    centres = (0.5 + steps * torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)) % 1
    return torch.cat([0.06 + 0.88 * centres, torch.full((count, 2), 0.25, dtype=torch.float64)], 1).float()


def _fit_box_attention(decoder: Sam3DetrDecoder, steps: int = 400) -> None:
    """Teach the relative box bias to look inside and around the reference box before any training."""
    generator = torch.Generator().manual_seed(0)
    for mlp in (decoder.box_rpb_embed_x, decoder.box_rpb_embed_y):
        optimizer = torch.optim.Adam(mlp.parameters(), lr=5e-3)
        for _ in range(steps):
            centre = torch.rand(256, 1, generator=generator)
            half = 0.02 + 0.3 * torch.rand(256, 1, generator=generator)
            position = torch.rand(256, 1, generator=generator)
            deltas = torch.cat([position - (centre - half), position - (centre + half)], 1) * 8
            encoded = deltas.sign() * (deltas.abs() + 1).log2() / 3
            outside = ((position - centre).abs() - half).clamp(min=0)
            heads = decoder.config.num_attention_heads
            sharpness = torch.linspace(4, 40, heads)
            loss = (mlp(encoded) + (outside * sharpness).clamp(max=6)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write a CLIP tokenizer whose vocabulary is every byte plus one token for each of ``words``; return its size.

    Any text can be encoded: a word outside the vocabulary becomes a sequence of smaller pieces.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    characters = sorted(ByteLevel.alphabet())
    tokens = characters + [character + "</w>" for character in characters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return len(tokens)


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: the earliest learned merge first."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, math.inf), place) for place, pair in enumerate(pairwise(pieces))]
        rank, place = min(pairs)
        if rank == math.inf:
            break
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]
    return pieces


def save_tiny(model: Sam3Model, tokenizer_folder: Path, folder: Path) -> None:
    """Write model (float16 safetensors), tokenizer and processor settings as a folder that transformers loads.

    Args:
        model: with the configuration of ``tiny_config``.
        tokenizer_folder: what ``write_tokenizer`` wrote.
        folder: created, or overwritten file by file.
    """
    from transformers import CLIPTokenizer, Sam3ImageProcessor, Sam3Processor

    tokenizer = CLIPTokenizer(
        vocab=str(tokenizer_folder / "vocab.json"),
        merges=str(tokenizer_folder / "merges.txt"),
        model_max_length=CONTEXT,
    )
    side = IMAGE_SIZE // PATCH_SIZE * 4
    image_processor = Sam3ImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, mask_size={"height": side, "width": side}
    )
    folder.mkdir(parents=True, exist_ok=True)
    Sam3Processor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    copy = Sam3Model(model.config).half()
    copy.load_state_dict(half)
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
