"""What a run is: one pydantic model per subject, read from YAML, presets and overrides.

The package imports neither torch nor Ray.
"""

from .loading import load_config, preset_names
from .lora import COMPONENTS
from .root import Config

__all__ = ["COMPONENTS", "Config", "load_config", "preset_names"]
