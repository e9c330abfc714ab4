"""Keys that have no effect with a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .root import Config


def idle_keys(config: Config, reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each key `section.name` that is set all the same; `reasons` says why it has no effect.

    A key that stands for a section stands for all of its keys.
    """
    for key, reason in reasons.items():
        section, name = key.split(".")
        values = getattr(config, section)
        if getattr(values, name) != type(values).model_fields[name].get_default(call_default_factory=True):
            yield f"{key} has no effect with task {config.task}, where {reason}: remove it"
