"""Settings of training: batch, optimizer, schedule, checkpoints, caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UserError
from ._section import LocalPath, Section
from .components import COMPONENTS
from .loss import LossSection

_SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_warmup": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt",
}
BATCH_SIZE = 2
OnBadImage = Literal["stop", "skip"]


class TrainingSection(Section):
    """Data folder, batch, optimizer, schedule, checkpoints and caches. A step is one update of the weights."""

    data_dir: LocalPath | None = Field(default=None, description="Folder that holds train/ and valid/ in COCO format.")
    batch_size: int | Literal["auto"] = Field(
        default=BATCH_SIZE,
        description="Most images of a worker in one forward; all prompts of an image go with it. auto = as many as fit "
        "in memory, measured when the run starts.",
    )
    images_per_step: int | None = Field(
        default=None,
        ge=1,
        description="Images of one step over all workers, of which each takes its share. None = batch_size (auto: "
        f"{BATCH_SIZE}) x gradient_accumulation_steps x workers at the start of the run.",
    )
    num_epochs: int = Field(default=20, ge=1, description="Passes over the training images.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop after this many steps, even if epochs are left."
    )
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    component_learning_rates: dict[str, float] = Field(
        default_factory=dict, description="Component -> peak learning rate, such as {detr_decoder: 1e-4}."
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="Weight decay of AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the gradient's running mean.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the squared gradient's running mean.")
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1, description="Added to AdamW's denominator.")
    num_negatives: int | None = Field(
        default=3,
        ge=-1,
        description="Prompts per image whose object is absent; None or -1 = all that are known absent.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches of a worker that make one step, where images_per_step is not set."
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=0.5, description="Share of the run over which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="The same as a number of steps, at most half of the run; None = warmup_ratio."
    )
    lr_scheduler: Literal["cosine", "constant", "inverse_sqrt"] = Field(
        default="cosine", description="Shape of the learning rate after the warm-up."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to at most this L2 norm.")
    mixed_precision: Literal["auto", "bf16", "no"] = Field(
        default="auto", description="Number type in the forward pass. auto = bf16, or no where a GPU does not have it."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of order, augmentation, negatives and new weights.")
    logging_steps: int = Field(default=10, ge=1, description="Steps between lines of metrics.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between measurements of the validation loss; None = every epoch."
    )
    save_steps: int | None = Field(default=None, ge=1, description="Steps between checkpoints; None = every epoch.")
    save_minutes: float | None = Field(
        default=10.0, gt=0, description="Minutes after which a checkpoint is due in any case; None = never by time."
    )
    save_total_limit: int = Field(default=3, ge=1, description="Checkpoints kept for --resume; older ones are deleted.")
    num_workers: int = Field(default=2, ge=1, description="CPUs that read and decode images, for each worker.")
    max_prompts_per_forward: int | Literal["auto"] = Field(
        default="auto",
        description="Most (image, prompt) pairs at a time: bounds memory when there are many classes. auto = as many "
        "as fit on a GPU, measured when the run starts; on a CPU by the size of the images.",
    )
    gradient_checkpointing: bool | tuple[str, ...] = Field(
        default=False, description="Recompute activations to save memory: true, false, or a list of components."
    )
    compile: bool = Field(
        default=False,
        description="Compile the layers of the vision trunk by torch.compile: slower to start, then faster.",
    )
    cuda_graphs: bool | None = Field(
        default=None,
        description="Start the stages of the model on a GPU as CUDA graphs: fewer launches, more memory. None = unless "
        "the environment variable SAM3LORA_CUDA_GRAPHS is 0.",
    )
    model_dropout: bool = Field(default=False, description="Keep SAM 3's own dropout on while training.")
    one_to_many: bool = Field(default=True, description="Train the one-to-many branch too, as SAM 3 does.")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after so many validations without a better one; None = never."
    )
    on_bad_image: OnBadImage = Field(
        default="stop",
        description="What a missing or unreadable image does: end the run or the evaluation, or be skipped and named.",
    )
    feature_cache: Literal["auto"] | bool = Field(
        default="auto",
        description="Cache the output of the frozen first layers of the vision trunk on disk. auto = where the first "
        "layer is not adapted and images are not augmented; true = refuse to train elsewhere.",
    )
    feature_cache_type: Literal["auto", "int8"] = Field(
        default="auto",
        description="Precision of cached features: auto = exact; int8 = a half or a quarter of the size.",
    )
    cache_memory_gb: float = Field(
        default=1.0, ge=0, description="Size of the features that each worker also keeps in memory; 0 = none."
    )
    frame_cache: bool = Field(
        default=False,
        description="Cache decoded, resized images on disk where features are not cached.",
    )
    cache_dir: LocalPath | None = Field(
        default=None, description="Folder of both caches; None = SAM3LORA_CACHE, else ~/.cache/sam3lora."
    )
    cache_gb: float = Field(
        default=20.0, gt=0, description="Largest size of that folder; the least recently used files are deleted first."
    )
    loss: LossSection = Field(default_factory=LossSection, description="Weights and options of the loss.")

    @field_validator("batch_size", "max_prompts_per_forward", mode="before")
    @classmethod
    def _read_number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError('should be a whole number of at least 1, or "auto"')

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _read_precision(cls, value: Any) -> Any:
        if value in (None, False):
            return "no"
        if value == "fp16":
            raise ValueError('"fp16" overflows in SAM 3 and is not offered: write bf16, or no on hardware without it')
        return value

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _read_schedule(cls, value: Any) -> Any:
        if value == "linear":
            raise ValueError('"linear" is not offered: write cosine (also ends near 0), constant or inverse_sqrt')
        return _SCHEDULES.get(value, value) if isinstance(value, str) else value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _read_checkpointing(cls, value: Any) -> bool | tuple[str, ...]:
        if isinstance(value, bool):
            return value
        if isinstance(value, list | tuple) and value and all(name in COMPONENTS for name in value):
            return tuple(dict.fromkeys(value))
        raise ValueError(f"should be true, false or a list of some of {', '.join(COMPONENTS)}")

    @field_validator("feature_cache", mode="before")
    @classmethod
    def _read_feature_cache(cls, value: Any) -> bool | str:
        if isinstance(value, bool) or value == "auto":
            return value
        raise ValueError('should be "auto", true or false')

    @field_validator("component_learning_rates")
    @classmethod
    def _check_components(cls, rates: dict[str, float]) -> dict[str, float]:
        for name, rate in rates.items():
            if name not in COMPONENTS:
                raise ValueError(f'names "{name}", which is not one of {", ".join(COMPONENTS)}')
            if not 0 < rate <= 1:
                raise ValueError(f"should hold rates greater than 0 and at most 1, {name} has {rate}")
        return rates

    @model_validator(mode="after")
    def _check_warmup(self) -> TrainingSection:
        if self.warmup_steps is not None and self.warmup_ratio != type(self).model_fields["warmup_ratio"].default:
            raise ValueError(
                f"warmup_ratio has no effect beside warmup_steps {self.warmup_steps}: remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> TrainingSection:
        for name in ("feature_cache_type", "cache_memory_gb"):
            if self.feature_cache is False and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect while feature_cache is false: set feature_cache to auto")
        return self

    @model_validator(mode="after")
    def _check_step(self) -> TrainingSection:
        if self.images_per_step is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} has no effect beside images_per_step "
                f"{self.images_per_step}, made of as many forwards as it needs: set images_per_step alone, or to null"
            )
        return self

    @model_validator(mode="after")
    def _check_branch(self) -> TrainingSection:
        default = LossSection.model_fields["o2m"].default
        if not self.one_to_many and self.loss.o2m != default:
            raise ValueError("loss.o2m has no effect while one_to_many is false: set one_to_many to true")
        return self

    @property
    def images_per_forward(self) -> int:
        """`batch_size` as a number, which it is once a run has been set up."""
        if self.batch_size == "auto":
            raise ValueError("training.batch_size is auto: it is known when the run has been set up")
        return self.batch_size

    @property
    def prompts_per_forward(self) -> int:
        """`max_prompts_per_forward` as a number, which it is once a run has been set up."""
        if self.max_prompts_per_forward == "auto":
            raise ValueError("training.max_prompts_per_forward is auto: it is known when the run has been set up")
        return self.max_prompts_per_forward

    def required_data_dir(self) -> Path:
        """The data folder; UserError if `data_dir` is not set, or is no folder."""
        if self.data_dir is None:
            raise UserError(
                "training.data_dir is not set: give --data-dir DIR, the folder that holds train/ and valid/"
            )
        path = Path(self.data_dir).expanduser()
        if not path.is_dir():
            raise UserError(f"training.data_dir: no folder at {path}; expected one that holds train/ and valid/")
        return path


def images_per_step(training: TrainingSection, num_workers: int) -> int:
    """Images of one step over all workers of a run that starts with so many."""
    if training.images_per_step is not None:
        return training.images_per_step
    batch_size = BATCH_SIZE if training.batch_size == "auto" else training.batch_size
    return batch_size * training.gradient_accumulation_steps * num_workers


def warmup_steps(training: TrainingSection, total_steps: int) -> int:
    """Steps over which the learning rate rises in a run of so many."""
    if training.warmup_steps is not None:
        return min(training.warmup_steps, total_steps // 2)
    return round(training.warmup_ratio * total_steps)
