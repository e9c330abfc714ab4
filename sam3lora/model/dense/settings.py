"""`DenseSettings`: all that is needed to build the model of a dense run again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sam3lora.config._section import Settings
from sam3lora.errors import UserError

Mode = Literal["binary", "multiclass", "multilabel"]
BACKGROUND = "background"


class DenseSettings(Settings):
    """What the folder of a dense run records of its model.

    `classes` are the names of the head's outputs in their order; the first of mode multiclass is the background.
    `layers` are numbers of the trunk's layers, ascending.
    """

    mode: Mode
    classes: tuple[str, ...] = Field(min_length=1, max_length=255)
    layers: tuple[int, ...] = Field(min_length=1, max_length=4)
    width: int = Field(ge=1, le=1024)
    norm: Literal["group", "batch"] = "group"
    bottleneck_width: int | None = Field(default=None, ge=1, le=1024)
    threshold: float = Field(default=0.5, gt=0, lt=1)

    @property
    def foreground(self) -> tuple[str, ...]:
        """The classes without the background."""
        return self.classes[1:] if self.mode == "multiclass" else self.classes

    def number(self, name: str) -> int:
        """The output of a class.

        Raises:
            UserError: There is no such class.
        """
        if name not in self.classes:
            raise UserError(f"there is no class {name!r}: expected one of {', '.join(self.classes)}")
        return self.classes.index(name)

    def value(self, name: str) -> int:
        """The value of a class in label maps: 0 is the background, from 1 on the foreground.

        Raises:
            UserError: There is no such class.
        """
        return self.number(name) + len(self.foreground) + 1 - len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `DenseSettings(**values)` gives equal settings."""
        return self.model_dump(mode="json")

    @property
    def names_of_maps(self) -> list[tuple[str, ...]]:
        """Names of the values 0, 1, ... of each label map: one map, or with multilabel one for each class."""
        return [self.classes] if self.mode == "multiclass" else [(BACKGROUND, name) for name in self.classes]
