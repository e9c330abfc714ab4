"""Settings of messages, progress and plots."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ._section import Section


class LoggingSection(Section):
    """Messages, progress and plots."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Lowest level of messages that are shown."
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files too.")
    plots: bool = Field(default=True, description="Draw loss curves into <output_dir>/plots.")
    progress: Literal["auto", "bar", "lines", "off"] = Field(
        default="auto", description='"auto" = a bar in a terminal, lines elsewhere.'
    )

    @field_validator("level", mode="before")
    @classmethod
    def _read_level(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("progress", mode="before")
    @classmethod
    def _read_progress(cls, value: Any) -> Any:
        """YAML 1.1 readers turn a bare `off` into false."""
        return "off" if value is False else value
