"""Which keys of a configuration a sweep may vary, and what type a key has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from sam3lora.config import Config
from sam3lora.config.keys import known_keys, set_key, split_known
from sam3lora.tune.component_sets import COMPONENTS_KEY, components_of
from sam3lora.tune.parameters import Choice, LogUniform, Parameter, Range, Tied, Uniform

_ONE_MODEL = "adapters of different base models are not comparable: give each its own sweep, with --config or under set"
_SAME_LENGTH = "all trials train equally long, so that they can be compared: write it under set"
_SAME_DATA = "every trial must be measured on the same data: write it under set"
_NO_EFFECT = "it does not change what is learned: write it under set"

NOT_SEARCHED: dict[str, str] = {
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
    "training.save_total_limit": _NO_EFFECT,
    "training.num_workers": _NO_EFFECT,
    "training.feature_cache": _NO_EFFECT,
    "training.frame_cache": _NO_EFFECT,
    "training.cache_dir": _NO_EFFECT,
    "training.cache_gb": _NO_EFFECT,
    "data.train_split": _SAME_DATA,
    "data.valid_split": _SAME_DATA,
    "data.annotation_file": _SAME_DATA,
    "data.categories": _SAME_DATA,
    "data.exhaustive": "it is a fact about the annotations: write it under set",
}
"""Keys and sections that are the same for all trials, with the reason."""

CHANGES_VALIDATION_LOSS = (
    "training.loss",
    "training.num_negatives",
    "training.one_to_many",
    "data.prompts",
    "data.negative_prompts",
    "model.resolution",
)
"""Keys and sections that change what the validation loss is made of, so that its values do not compare."""


def _is_under(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")


def check_key(key: str, parameters: Iterable[str]) -> None:
    """Raise ValueError unless a key may be a parameter beside the other ones."""
    if key == COMPONENTS_KEY:
        flags = [name for name in parameters if name.startswith("lora.apply_to_")]
        if flags:
            raise ValueError(f"it sets every lora.apply_to_* flag, and {flags[0]} is a parameter too: keep one")
        return
    if reason := unknown_key(key):
        raise ValueError(reason.removeprefix(f"{key}: "))
    if reason := next((reason for above, reason in NOT_SEARCHED.items() if _is_under(key, above)), None):
        raise ValueError(f"cannot be searched: {reason}")


def check_kind(parameter: Parameter, own_sets: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless the kind of parameter suits what its key holds, or a component set is unknown."""
    if parameter.key == COMPONENTS_KEY:
        if not isinstance(parameter, Choice) or parameter.labels is not None:
            raise ValueError("expected {choice: [...]} or {grid: [...]} of names of component sets")
        for name in parameter.values:
            components_of(str(name), own_sets)
        return
    kind = number_type(parameter.key)
    if isinstance(parameter, Range | Tied) and kind is None:
        raise ValueError(f"{parameter.key} holds no number, so it cannot be {parameter.kind}: write choice")
    if isinstance(parameter, Uniform | LogUniform) and kind is int:
        raise ValueError(f"{parameter.key} is a whole number: write randint instead of {parameter.kind}")


def changes_validation_loss(key: str) -> bool:
    return any(_is_under(key, above) for above in CHANGES_VALIDATION_LOSS)


def unknown_key(key: str) -> str | None:
    """What is wrong with a dotted key that no configuration has, with the nearest one; None for a known key."""
    raw: dict[str, Any] = {}
    if not all(key.split(".")):
        return f'"{key}" is no dotted key such as lora.rank'
    if inner := next((name for name in known_keys() if name.startswith(f"{key}.")), None):
        return f"{key}: is a section; write one of its keys, such as {inner}"
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
    options = get_args(annotation) if get_origin(annotation) is not None else ()
    if get_origin(annotation) in (tuple, list, dict):
        return {get_origin(annotation)}
    return {annotation} if not options else {kind for option in options for kind in _types(option)}
