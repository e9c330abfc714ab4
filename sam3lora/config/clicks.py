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


class ClicksSection(Section):
    """The interactions that are simulated, and the vision trunk under the click head, where `task` is clicks."""

    iterations: int = Field(default=3, ge=0, le=16, description="Correcting clicks on each object after the start.")
    starts: StartShares = Field(default_factory=StartShares, description="How interactions start.")
    objects_per_image: int = Field(
        default=16, ge=1, le=32, description="Most objects of an image in an epoch; of more, other ones are drawn each."
    )
    vision_adapter: LocalPath | None = Field(
        default=None,
        min_length=1,
        description="Folder of an adapter whose vision trunk the click head is to be used with; None = the base's.",
    )


_FROZEN = "the vision trunk is frozen"
_IDLE = {
    "training.component_learning_rates": "all that learns has training.learning_rate",
    "training.loss": "the loss has fixed weights",
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
