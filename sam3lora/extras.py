"""Optional packages that a configuration needs, looked for before any worker starts."""

from __future__ import annotations

import importlib.util

from sam3lora.config import Config
from sam3lora.errors import UserError


def check_extras(config: Config) -> None:
    """Check that what the settings of a run need is installed; imports nothing.

    Raises:
        UserError: A package is missing; the message names the setting and the line that installs it.
    """
    needs = (
        ("logging.tensorboard is true", config.logging.tensorboard, "tensorboard", "tensorboard"),
        (f"model.quantization is {config.model.quantization}", _quantizes(config), "bitsandbytes", "quantization"),
    )
    for setting, is_needed, package, extra in needs:
        if is_needed and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{setting}, but {package} is not installed: pip install 'sam3lora[{extra}]' on every host, or change "
                "the setting"
            )


def _quantizes(config: Config) -> bool:
    return config.model.quantization != "none"
