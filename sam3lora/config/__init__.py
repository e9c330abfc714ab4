"""The configuration of a run: one pydantic model per section, loaded from presets, YAML files and overrides.

Imports neither torch nor Ray. pydantic is imported when a configuration is first used, because the names of components
are needed where it is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .components import COMPONENTS
    from .loading import load_config, preset_names
    from .root import Config

_HOME = {"COMPONENTS": "components", "Config": "root", "load_config": "loading", "preset_names": "loading"}

__all__ = ["COMPONENTS", "Config", "load_config", "preset_names"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
