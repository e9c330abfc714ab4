"""Settings of the data: splits, prompts, negatives, augmentation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ._section import LocalPath, Section


class DataSection(Section):
    """Splits, prompts, negatives and augmentation of the data in `training.data_dir`."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    train_split: str = Field(default="train", min_length=1, description="Split to train on: its folder, or train2017.")
    valid_split: str = Field(
        default="valid", min_length=1, description="Split to validate on; val and validation are the same as valid."
    )
    annotation_file: LocalPath = Field(
        default="_annotations.coco.json",
        min_length=1,
        description="COCO file in the folder of each split; the default also finds the layouts of other tools.",
    )
    categories: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Names of the categories to use; None = all that have objects."
    )
    prompts: dict[str, str] = Field(
        default_factory=dict, description="Category name -> prompt text, where the name is not a good prompt."
    )
    negative_prompts: tuple[str, ...] = Field(
        default=(), description="Further prompts, none of which any image of the data shows."
    )
    exhaustive: bool | tuple[str, ...] = Field(
        default=True,
        description="Whether every object of a category is annotated, so that an image without a label of it does not "
        "show it: true for all categories, a list of names for these alone, false for none. The others are asked only "
        "of images with a label of them, and what has no label there is not taught to be background.",
    )
    augmentation: Literal["none", "sam3"] = Field(
        default="none", description='"sam3" = random size and position on a padded square, as in the training of SAM 3.'
    )
    horizontal_flip: float = Field(default=0.0, ge=0, le=1, description="Probability of mirroring an image.")
    vertical_flip: float = Field(
        default=0.0, ge=0, le=1, description="Probability of turning an image upside down; for images without an up."
    )
    max_objects_per_query: int | None = Field(
        default=None, ge=1, description="Most objects of a prompt that are kept, drawn at random; None = all."
    )

    @field_validator("exhaustive", mode="before")
    @classmethod
    def _read_exhaustive(cls, value: Any) -> Any:
        if isinstance(value, bool | list | tuple):
            return value
        raise ValueError("should be true, false or a list of category names")

    @model_validator(mode="after")
    def _check_words(self) -> DataSection:
        complete = self.exhaustive if isinstance(self.exhaustive, tuple) else ()
        listed = {
            "categories": self.categories or (),
            "negative_prompts": self.negative_prompts,
            "exhaustive": complete,
        }
        for key, words in listed.items():
            if any(not word.strip() for word in words):
                raise ValueError(f"{key} holds an empty text: remove it")
            if len(set(words)) < len(words):
                twice = next(word for word in words if words.count(word) > 1)
                raise ValueError(f'{key} holds "{twice}" twice: remove one')
        if isinstance(self.exhaustive, tuple) and not self.exhaustive:
            raise ValueError("exhaustive holds no name: write false if no category is annotated completely")
        for name in complete:
            if self.categories is not None and name not in self.categories:
                raise ValueError(f'exhaustive names "{name}", which is not in categories: add it there or remove it')
        for name, prompt in self.prompts.items():
            if not prompt.strip():
                raise ValueError(f'prompts gives "{name}" an empty prompt: write what to look for')
            if self.categories is not None and name not in self.categories:
                raise ValueError(f'prompts names "{name}", which is not in categories: add it there or remove it here')
        return self
