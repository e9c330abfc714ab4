"""Distributed LoRA fine-tuning and multi-adapter serving of SAM 3.

Everything public is loaded when it is first used, so that `import sam3lora` costs nothing:

    from sam3lora import Predictor, train, evaluate, load_config
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Predictor": "sam3lora.infer.predictor",
    "load_config": "sam3lora.config",
    "apply_lora": "sam3lora.model.adapters",
    "count_parameters": "sam3lora.model.adapters",
    "save_adapter": "sam3lora.model.adapters",
    "load_adapter": "sam3lora.model.adapters",
}
_CALLABLE_PACKAGES = ("train", "evaluate")

__all__ = [*_HOME, *_CALLABLE_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"sam3lora.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sam3lora' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """A package that can be called as the function of its own name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _Sam3Lora(ModuleType):
    """`train` and `evaluate` are functions and packages; which of them Python binds to the name here would depend on
    the order of imports. The package is bound always, and made callable when it is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Sam3Lora
