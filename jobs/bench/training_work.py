"""The work of the training benchmarks: a model with random weights, a preset's adapter, drawn images with targets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, Sam3Model

from jobs.bench.models import CONFIGS, random_model
from sam3lora.config import Config, load_config
from sam3lora.config.lora import LoraSettings
from sam3lora.data.batch import Batch
from sam3lora.data.synth.scenes import NATURAL, SHAPES, Scene, draw_scene
from sam3lora.errors import UserError
from sam3lora.losses import Criterion, Normalizer
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.tiny import TINY_FOLDER
from sam3lora.training.optimization import set_training_mode
from sam3lora.training.step import StepCounts

PATCH_SIZE = 14
PIXEL_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class TrainingWork:
    """One step's worth of training, the same for all ways of doing it.

    Args:
        preset: Its adapter and settings, the precision aside.
        model: A configuration of `CONFIGS`, filled with random weights.
        num_images: Images of a step.
        num_prompts: Prompts on each image, half of them present where the image has as many kinds of objects.
        precision: "bf16" is bfloat16 autocast.
        geometry_cls: Whether prompts carry the geometry CLS token. The stock forward leaves it out.
        dropout: Of the adapter; None takes the preset's.
        device: Where the model is made.

    Raises:
        UserError: An unknown model, or a number below 1.
    """

    preset: str
    model: str = "small"
    num_images: int = 1
    num_prompts: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"
    geometry_cls: bool = False
    dropout: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model not in CONFIGS:
            raise UserError(f"model must be one of {', '.join(CONFIGS)}, got {self.model!r}")
        for name in ("num_images", "num_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @cached_property
    def config(self) -> Config:
        return load_config(self.preset)

    @property
    def lora(self) -> LoraSettings:
        """Without the geometry CLS token nothing reaches the geometry encoder: it gets no adapter then."""
        settings = self.config.lora.settings
        if not self.geometry_cls:
            components = tuple(name for name in settings.components or () if name != "geometry_encoder")
            settings = settings.model_copy(update={"components": components})
        return settings if self.dropout is None else settings.model_copy(update={"dropout": self.dropout})

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def resolution(self) -> int:
        return CONFIGS[self.model]().image_size

    def adapted_model(self) -> PeftModel:
        """The model with the adapter in training mode; B is not zero, so that every adapter weight has a gradient."""
        model = apply_lora(random_model(self.model, device=self.device), self.lora, geometry_cls=self.geometry_cls)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        set_training_mode(model, model_dropout=False)
        return model

    def batch(self, *, first_image: int = 0) -> Batch:
        """Images numbered from `first_image`, drawn anew; the same number gives the same image."""
        side = self.resolution
        low = self.config.training.loss.mask_resolution == "low"
        samples = [
            _Sample(number, side, self.num_prompts) for number in range(first_image, first_image + self.num_images)
        ]
        return _as_batch(samples, side // PATCH_SIZE * 4 if low else side)


def sam3_of(model: PeftModel) -> Sam3Model:
    return cast(Sam3Model, model.get_base_model())


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_FOLDER, local_files_only=True)


def criterion(work: TrainingWork, kind: type[Criterion] = Criterion) -> Criterion:
    """The loss of the preset; where a prompt has no target, masks are left out."""
    return kind(work.config.training.loss, touch_unused=False)


def normalizer(batch: Batch) -> Normalizer:
    """Counts of a step of this one batch."""
    return StepCounts.of([batch]).normalizer()


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of the adapter in one vector, in the order of the parameters; zero where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
    )


class _Sample:
    """A drawn image and its prompts: the nouns of at most half as many kinds of objects, then absent nouns."""

    def __init__(self, number: int, side: int, num_prompts: int) -> None:
        self.number = number
        self.scene: Scene = draw_scene(np.random.default_rng(number), size=side)
        present = list(dict.fromkeys(thing.noun for thing in self.scene.objects))
        absent = [noun for noun in (*SHAPES, *NATURAL) if noun not in present]
        positive = present[: max(1, num_prompts // 2)]
        negative = [f"{word}{noun}" for word in ("", "small ", "large ") for noun in absent]
        self.prompts = (positive + negative)[:num_prompts]
        self.masks = [[thing.mask_HW for thing in self.scene.objects if thing.noun == noun] for noun in self.prompts]


def _as_batch(samples: list[_Sample], mask_size: int) -> Batch:
    masks_THW = np.stack([mask for sample in samples for masks in sample.masks for mask in masks])
    num_B = np.array([len(masks) for sample in samples for masks in sample.masks])
    step = masks_THW.shape[1] / mask_size
    rows = ((np.arange(mask_size) + 0.5) * step).astype(int)
    side = samples[0].scene.image_HW3.shape[0]
    return Batch(
        images_NHWC=np.stack([sample.scene.image_HW3 for sample in samples]),
        image_rows_N=np.arange(len(samples)),
        feature_keys_I=[None] * len(samples),
        image_ids=np.array([sample.number for sample in samples]),
        paths=[f"scene {sample.number}" for sample in samples],
        original_sizes_hw=np.full((len(samples), 2), side),
        query_image_B=np.repeat(np.arange(len(samples)), len(samples[0].prompts)),
        prompts_B=[prompt for sample in samples for prompt in sample.prompts],
        num_B=num_B,
        exhaustive_B=np.ones(len(num_B), dtype=bool),
        boxes_cxcywh_T4=np.stack([_box_cxcywh(mask) for mask in masks_THW]).astype(np.float32),
        masks_packed=np.packbits(masks_THW[:, rows[:, None], rows].reshape(len(masks_THW), -1), axis=1),
        mask_size=mask_size,
        mask_valid_T=np.ones(len(masks_THW), dtype=bool),
        skipped=[],
    )


def _box_cxcywh(mask_HW: np.ndarray) -> np.ndarray:
    """Relative to the sides of the mask."""
    y, x = np.nonzero(mask_HW)
    low, high = np.array([x.min(), y.min()]), np.array([x.max() + 1, y.max() + 1])
    return np.concatenate([(low + high) / 2, high - low]) / mask_HW.shape[0]
