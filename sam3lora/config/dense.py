"""Settings of dense prediction: a label for each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ._section import Section
from .task_keys import problems_without_prompts

if TYPE_CHECKING:
    from .root import Config

_WIDTH_STEP = 32


class DenseSection(Section):
    """Classes, head and loss of dense prediction, where `task` is dense."""

    mode: Literal["auto", "binary", "multiclass", "multilabel"] = Field(
        default="auto",
        description="binary = all categories together against the background; multiclass = one class a pixel; "
        "multilabel = classes that may overlap. auto = binary for one category, else multiclass.",
    )
    foreground: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Categories that are the foreground of mode binary, the others are background; None = all.",
    )
    adapter: Literal["lora", "bottleneck", "none"] = Field(
        default="lora",
        description="What adapts the vision trunk: the section lora, the bottlenecks of SAM3-UNet before each layer, "
        "or nothing, so that the trunk's output is computed once an image.",
    )
    bottleneck_width: int = Field(default=32, ge=1, le=1024, description="Width of the bottlenecks.")
    layers: Literal["last", "global"] | tuple[int, ...] = Field(
        default="global",
        description="Layers of the vision trunk whose output the head reads: last, global (those with global "
        "attention), or one to four of their numbers, ascending from 0.",
    )
    width: int = Field(default=128, ge=_WIDTH_STEP, le=1024, description="Channels of the head, a multiple of 32.")
    norm: Literal["group", "batch"] = Field(
        default="group", description="Norm in the head. batch makes results depend on the batch and its workers."
    )
    deep_supervision: tuple[float, float, float] = Field(
        default=(1.0, 0.4, 0.2),
        description="Weights of the loss at 4, 2 and 1 pixels to a side of a patch; the first is above 0.",
    )
    boundary_weight: float = Field(
        default=5.0, ge=0, le=100, description="How much more pixels near a boundary weigh; 0 = all alike."
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Peak learning rate of the head.")
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="Probability from which a pixel has a class, in binary and multilabel."
    )

    @property
    def level_weights(self) -> tuple[float, ...]:
        """`deep_supervision` up to its last weight above 0."""
        weights = self.deep_supervision
        return weights[: max(number for number, weight in enumerate(weights, 1) if weight)]

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        if value in ("last", "global"):
            return value
        if isinstance(value, list | tuple) and 1 <= len(value) <= 4:
            numbers = [one for one in value if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
            if list(value) == sorted(set(numbers)):
                return tuple(value)
        raise ValueError("should be last, global, or one to four layer numbers in ascending order, such as [15, 31]")

    @field_validator("width")
    @classmethod
    def _check_width(cls, width: int) -> int:
        if width % _WIDTH_STEP:
            raise ValueError(f"should be a multiple of {_WIDTH_STEP}")
        return width

    @field_validator("deep_supervision")
    @classmethod
    def _check_weights(cls, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        if weights[0] <= 0 or min(weights) < 0:
            raise ValueError("should be three weights of at least 0, the first above 0")
        return weights

    @model_validator(mode="after")
    def _check_use(self) -> DenseSection:
        if self.foreground is not None and self.mode not in ("auto", "binary"):
            raise ValueError(f"foreground has no effect with mode {self.mode}: set mode to binary, or remove it")
        if self.bottleneck_width != 32 and self.adapter != "bottleneck":
            raise ValueError(
                f"bottleneck_width has no effect with adapter {self.adapter}: set adapter to bottleneck, or remove it"
            )
        return self


_IDLE = {
    "training.component_learning_rates": "the head has dense.learning_rate, the trunk training.learning_rate",
    "training.loss": "the weights are dense.deep_supervision and dense.boundary_weight",
    "data.exhaustive": "a pixel without a label is background",
    "evaluation.threshold": "the threshold is dense.threshold",
    "evaluation.prompt_thresholds": "the threshold is dense.threshold",
}


def dense_problems(config: Config) -> Iterator[str]:
    """What does not go with task dense, each as a line for the user."""
    yield from problems_without_prompts(config, _IDLE)
    yield from _lora_problems(config)


def _lora_problems(config: Config) -> Iterator[str]:
    lora, adapter = config.lora, config.dense.adapter
    others = [f"lora.apply_to_{name}" for name in lora.components if name != "vision_encoder"]
    if others:
        yield f"{others[0]} has no effect with task dense, which uses the vision trunk only: remove it"
    elif adapter == "lora" and not lora.components:
        yield "dense.adapter is lora, but lora.apply_to_vision_encoder is false: set it to true, or adapter to none"
    elif adapter != "lora" and lora != type(lora)():
        yield f"lora has no effect while dense.adapter is {adapter}: remove the section, or set adapter to lora"
