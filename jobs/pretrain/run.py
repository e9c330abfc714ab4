"""The whole pre-training of the tiny base: draw scenes, vision stage, joint stage, measure, write the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer, Sam3Model

from jobs.pretrain.bank import build_bank
from jobs.pretrain.joint_stage import TokenHead, train_joint
from jobs.pretrain.measure import TinyReport, measure
from jobs.pretrain.snapshot import Snapshot
from jobs.pretrain.tiny_model import CONTEXT, initialise, save_tiny, tiny_config, write_tokenizer
from jobs.pretrain.vision_stage import DenseHeads, train_vision
from sam3lora.data.synth.scenes import WORDS
from sam3lora.model.staged.forward import StagedSam3


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the result; the defaults are those of the shipped model."""

    dense_scenes: int = 12000
    scenes: int = 16000
    held_out_scenes: int = 400
    vision_steps: int = 3400
    vision_batch: int = 16
    vision_learning_rate: float = 2e-3
    joint_steps: int = 4800
    joint_images: int = 8
    joint_learning_rate: float = 1e-3
    seed: int = 0


def pretrain(output_dir: Path, settings: PretrainSettings, log: Callable[[str], None] = print) -> TinyReport:
    """Train from random weights and write ``output_dir/tiny``; goes on where an earlier call was cut."""
    output_dir.mkdir(parents=True, exist_ok=True)
    banks = output_dir / "scenes"
    dense = build_bank(banks / "dense", settings.dense_scenes, seed=settings.seed + 11, dense=True)
    scenes = build_bank(banks / "base", settings.scenes, seed=settings.seed + 12)
    held_out = build_bank(banks / "held_out", settings.held_out_scenes, seed=settings.seed + 99)
    tokenizer_folder = output_dir / "tokenizer"
    vocab_size = write_tokenizer(tokenizer_folder, WORDS)
    tokenize = make_tokenize(tokenizer_folder)

    torch.manual_seed(settings.seed)
    model, heads, token_head = Sam3Model(tiny_config(vocab_size)), DenseHeads(), TokenHead()
    initialise(model)
    # Under bfloat16 on a CPU the fused attention's backward pass is the slowest part of a step.
    model.set_attn_implementation("eager")
    train_vision(
        model,
        heads,
        dense,
        steps=settings.vision_steps,
        batch_size=settings.vision_batch,
        learning_rate=settings.vision_learning_rate,
        seed=settings.seed,
        log=log,
        snapshot=Snapshot(output_dir / "vision.safetensors", {"vision": model.vision_encoder, "heads": heads}),
    )
    train_joint(
        model,
        heads,
        token_head,
        [(scenes, 0.6), (dense, 0.4)],
        tokenize,
        steps=settings.joint_steps,
        images_per_step=settings.joint_images,
        learning_rate=settings.joint_learning_rate,
        seed=settings.seed,
        log=log,
        snapshot=Snapshot(output_dir / "joint.safetensors", {"model": model, "heads": heads, "token": token_head}),
    )
    model.eval()
    report = measure(StagedSam3(model), tokenize, held_out)
    model.set_attn_implementation("sdpa")
    save_tiny(model, tokenizer_folder, output_dir / "tiny")
    summary: dict[str, Any] = {"settings": asdict(settings), "report": asdict(report)}
    (output_dir / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    return report


def make_tokenize(folder: Path) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    """Prompts -> token ids and attention mask (P, 32) by the tokenizer in ``folder``."""
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))

    def tokenize(prompts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer(prompts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        return encoded.input_ids, encoded.attention_mask

    return tokenize
