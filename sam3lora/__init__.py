"""Distributed LoRA fine-tuning and multi-adapter serving of SAM 3.

Everything public is loaded when it is first used, so that `import sam3lora` costs nothing:

    from sam3lora import Predictor, train, evaluate, load_config
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Predictor": "sam3lora.inference.predictor",
    "train": "sam3lora.training.launch",
    "evaluate": "sam3lora.evaluation.ask.run",
    "load_config": "sam3lora.config",
    "apply_lora": "sam3lora.model.adapter.lora_layers",
    "count_parameters": "sam3lora.model.adapter.lora_layers",
    "save_adapter": "sam3lora.model.adapter.lora_layers",
    "load_adapter": "sam3lora.model.adapter.lora_layers",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sam3lora' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
