"""Settings of LoRA on the click head, where `task` is clicks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ._section import LocalPath, Section
from .task_keys import problems_without_prompts

if TYPE_CHECKING:
    from .root import Config


class StartShares(Section):
    """How often simulated interactions start in each way; the shares need not add up to 1."""

    click: float = Field(default=0.5, ge=0, description="A click in the object.")
    box: float = Field(default=0.5, ge=0, description="A box that is a little off.")
    mask: float = Field(default=0.0, ge=0, description="A wrong mask, and a click that corrects it.")
    mask_and_box: float = Field(default=0.0, ge=0, description="The same with a box.")

    @model_validator(mode="after")
    def _check_sum(self) -> StartShares:
        if not any((self.click, self.box, self.mask, self.mask_and_box)):
            raise ValueError("all shares are 0: set one of click, box, mask and mask_and_box above 0")
        return self


class ClickLossSection(Section):
    """Weights of the loss of a prediction; 0 switches a term off. The defaults are those of SAM 2's fine-tuning."""

    focal: float = Field(default=20.0, ge=0, description="Focal loss of the cheapest mask, the mean over its pixels.")
    dice: float = Field(default=1.0, ge=0, description="Dice loss of the cheapest mask.")
    iou: float = Field(default=1.0, ge=0, description="L1 distance of expected and real IoU of all masks.")
    object: float = Field(default=1.0, ge=0, description="Cross-entropy of the score that the object is there.")

    def by_term(self) -> dict[str, float]:
        """The factor of each entry of `sam3lora.losses.clicks.ClickLossOutput.terms`."""
        weights = {"focal": self.focal, "dice": self.dice, "iou": self.iou, "object": self.object}
        return {f"click_{name}": weight for name, weight in weights.items()}

    @model_validator(mode="after")
    def _check_effect(self) -> ClickLossSection:
        if not self.focal and not self.dice:
            raise ValueError("no mask is learned: give focal or dice a positive weight")
        return self


class ClicksSection(Section):
    """The interactions that are simulated, and the vision trunk under the click head, where `task` is clicks."""

    iterations: int = Field(default=3, ge=0, le=16, description="Correcting clicks on each object after the start.")
    starts: StartShares = Field(default_factory=StartShares, description="How interactions start.")
    objects_per_image: int = Field(
        default=16, ge=1, le=32, description="Most objects of an image in an epoch; of more, other ones are drawn each."
    )
    loss: ClickLossSection = Field(default_factory=ClickLossSection, description="Weights of the loss.")
    vision_adapter: LocalPath | None = Field(
        default=None,
        min_length=1,
        description="Folder of an adapter whose vision trunk the click head is to be used with; None = the base's.",
    )


_FROZEN = "the vision trunk is frozen"
_IDLE = {
    "training.component_learning_rates": "all that learns has training.learning_rate",
    "training.loss": "the weights are those of clicks.loss",
    "training.gradient_checkpointing": "every prediction has a backward pass of its own",
    "training.compile": _FROZEN,
    "training.model_dropout": _FROZEN,
    "data.exhaustive": "only labelled objects are clicked on",
    "data.max_objects_per_query": "the bound is clicks.objects_per_image",
}


def clicks_problems(config: Config) -> Iterator[str]:
    """What does not go with task clicks, each as a line for the user."""
    yield from problems_without_prompts(config, _IDLE)
    if config.lora.components:
        yield (
            f"lora.apply_to_{config.lora.components[0]} has no effect with task clicks, which adapts the mask decoder "
            "of the click head: remove it"
        )
