"""What tests of kept features and frames share: a step, and what it took."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sam3lora.data import sample
from sam3lora.training.optimization import set_training_mode
from sam3lora.training.step import StepCounts
from sam3lora.training.trainer import Trainer

NUM_TRAIN, NUM_VALID = 6, 3
FROZEN = "lora.apply_to_vision_encoder=false"
LAST_LAYER = "lora.vision_last_layers=1"
NECK = "lora.target_modules=[proj1, proj2, box_head]"
NECK_ONLY = [
    NECK,
    *(f"lora.apply_to_{name}=false" for name in ("geometry_encoder", "detr_encoder", "mask_decoder", "scoring")),
]
OFF, BF16 = "training.feature_cache=false", "training.mixed_precision=bf16"
ON_DISK = "training.cache_memory_gb=0"  # and not in memory too
INT8 = "training.feature_cache_type=int8"


def step_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and loss terms of the first batch, in training mode."""
    batch = next(trainer.batches.training_batches(0, 0))
    set_training_mode(trainer.model, model_dropout=False)
    trainer.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    _, terms = trainer.runner.backward(batch, StepCounts.of([batch]).normalizer())
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return gradients, terms


def feature_files(folder: Path) -> list[Path]:
    """The files of a cache but the digests of images."""
    return [file for file in folder.glob("??/*.npy") if np.load(file).shape != (32,)]


def arrays(folder: Path) -> list[np.ndarray]:
    return [np.load(file) for file in feature_files(folder)]


def counts_of(trainer: Trainer) -> tuple[int, int]:
    return trainer.runner.images.vision_passes, trainer.runner.images.features_loaded


def record_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image files that are decoded for training and validation from now on."""
    names: list[str] = []
    read_image = sample.read_image

    def spy(path, *arguments, **options):
        names.append(Path(path).name)
        return read_image(path, *arguments, **options)

    monkeypatch.setattr(sample, "read_image", spy)
    return names
