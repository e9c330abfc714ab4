"""The base class of all sections of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator

from ..errors import UserError
from ..local_paths import path_problem


def _no_address(value: Any) -> Any:
    if problem := path_problem(value):
        raise ValueError(problem)
    return value


LocalPath = Annotated[str, BeforeValidator(_no_address)]
"""A key that holds a path, or a name that may be one."""


class Section(BaseModel):
    """An immutable group of settings that refuses keys it does not know and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`rank: true` would otherwise count as rank 1."""
        if isinstance(value, bool):
            annotation = cls.model_fields[str(info.field_name)].annotation
            types = {annotation, *get_args(annotation)}
            if bool not in types and types & {int, float}:
                raise ValueError("should be a number")
        return value


class Settings(Section):
    """A group of settings that Python code builds directly, without a configuration file.

    Raises:
        UserError: A value is out of range; the message names the first one.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or type(self).__name__
            reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
            raise UserError(f"{name} {reason}, got {first['input']!r}") from None
