"""The dotted keys of a configuration as a sweep sees them: which may vary, and which hold numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from sam3lora.config import Config
from sam3lora.config.keys import known_keys, set_key, split_known

_ONE_MODEL = "adapters of different base models are not comparable: give each its own sweep, with --config or under set"
_SAME_LENGTH = "all trials train equally long, so that they can be compared: write it under set"
_SAME_DATA = "every trial must be measured on the same data: write it under set"
_SAME_PROMPTS = "it changes the prompts of every metric, so results of its values do not compare: write it under set"
_SAME_CLASSES = "it changes the classes that are measured, so results of its values do not compare: write it under set"
_NO_EFFECT = "it does not change what is learned: write it under set"

NOT_SEARCHED: dict[str, str] = {
    "task": "adapters of different tasks are not comparable: write it under set",
    "dense.mode": _SAME_CLASSES,
    "dense.foreground": _SAME_CLASSES,
    "dense.threshold": "it changes how a pixel is decided, not what is learned: write it under set",
    "clicks.objects_per_image": "it changes which objects are measured: write it under set",
    "clicks.vision_adapter": "it says which vision trunk clicks will see, not what is learned: write it under set",
    "output": "each trial gets a folder of its own",
    "logging": _NO_EFFECT,
    "scaling": "it says what a trial runs on: write it under set",
    "evaluation": "it changes how detections are measured, not the adapter; sam3lora validate shows thresholds",
    "model.name": _ONE_MODEL,
    "model.revision": _ONE_MODEL,
    "model.local_files_only": _NO_EFFECT,
    "model.attention": _NO_EFFECT,
    "training.data_dir": _SAME_DATA,
    "training.num_epochs": _SAME_LENGTH,
    "training.max_steps": _SAME_LENGTH,
    "training.logging_steps": _NO_EFFECT,
    "training.eval_steps": "a sweep measures every epoch",
    "training.save_steps": "a sweep keeps a checkpoint of every epoch",
    "training.save_minutes": _NO_EFFECT,
    "training.save_total_limit": _NO_EFFECT,
    "training.num_workers": _NO_EFFECT,
    "training.feature_cache": _NO_EFFECT,
    "training.frame_cache": _NO_EFFECT,
    "training.cache_dir": _NO_EFFECT,
    "training.cache_gb": _NO_EFFECT,
    "training.cache_memory_gb": _NO_EFFECT,
    "training.compile": _NO_EFFECT,
    "training.feature_cache_type": "it says how features are kept: write it under set",
    "data.train_split": _SAME_DATA,
    "data.valid_split": _SAME_DATA,
    "data.annotation_file": _SAME_DATA,
    "data.categories": _SAME_DATA,
    "data.prompts": _SAME_PROMPTS,
    "data.negative_prompts": _SAME_PROMPTS,
    "data.exhaustive": "it is a fact about the annotations: write it under set",
}
"""Keys and sections that are the same for all trials, with the reason."""

CHANGES_VALIDATION_LOSS = (
    "training.loss",
    "training.num_negatives",
    "training.one_to_many",
    "model.resolution",
    "dense.deep_supervision",
    "dense.boundary_weight",
    "clicks.iterations",
    "clicks.starts",
    "clicks.loss",
)
"""Keys and sections that change what the validation loss is made of, so that its values do not compare."""


def is_under(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")


def value_at(raw: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in nested mappings; None where there is none."""
    if key in raw:
        return raw[key]
    name, _, below = key.partition(".")
    inner = raw.get(name)
    return value_at(inner, below) if isinstance(inner, Mapping) and below else None


def unknown_key(key: str) -> str | None:
    """What is wrong with a dotted key that no configuration has, with the nearest one; None for a known key."""
    if not all(key.split(".")):
        return f'"{key}" is not a dotted key such as lora.rank'
    if inner := next((name for name in known_keys() if name.startswith(f"{key}.")), None):
        return f"{key}: is a section; write one of its keys, such as {inner}"
    above = next((name for name in known_keys() if key.startswith(f"{name}.")), None)
    if above is not None and dict not in _types(_annotation(Config, above)):
        return f"{key}: unknown key; did you mean {above}?"
    raw: dict[str, Any] = {}
    set_key(raw, key, 0)
    return next(iter(split_known(raw)[1]), None)


def number_type(key: str) -> type[int] | type[float] | None:
    """int or float for a key that holds such a number (or none), None for any other."""
    kinds = _types(_annotation(Config, key))
    if bool in kinds or str in kinds:
        return None
    return float if float in kinds else int if int in kinds else None


def _annotation(model: type[BaseModel], key: str) -> Any:
    name, dot, below = key.partition(".")
    annotation = model.model_fields[name].annotation
    if not dot:
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _annotation(annotation, below)
    return get_args(annotation)[-1]  # of the values of a mapping


def _types(annotation: Any) -> set[Any]:
    """The types that a value may have: `int | list[str] | None` -> int, list, None."""
    options = get_args(annotation) if get_origin(annotation) is not None else ()
    if get_origin(annotation) in (tuple, list, dict):
        return {get_origin(annotation)}
    return {annotation} if not options else {kind for option in options for kind in _types(option)}
