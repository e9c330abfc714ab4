"""What a sweep may vary and compare: keys and their types, values, and the split that is held out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import numpy as np
from pydantic import BaseModel

from sam3lora.config import Config
from sam3lora.config.keys import known_keys, set_key, split_known
from sam3lora.errors import UserError
from sam3lora.tune.space.component_sets import COMPONENTS_KEY, components_of
from sam3lora.tune.space.parameters import (
    LARGEST_WHOLE,
    Choice,
    Grid,
    LogUniform,
    Parameter,
    Range,
    Tied,
    Uniform,
    short,
    value_text,
)

if TYPE_CHECKING:
    from sam3lora.tune.space.search_space import Search, SearchSpace

MOST_TRIALS = 10_000
"""Of a sweep; also the most combinations that the algorithm grid goes through."""

_COMBINATIONS_TRIED = 32
_MOST_REFUSED = 20
_LONGEST_NAME, _LONGEST_KEY, _DEEPEST, _MOST_VALUES = 100, 200, 20, 100_000  # far beyond what makes sense

_ONE_MODEL = "adapters of different base models are not comparable: give each its own sweep, with --config or under set"
_SAME_LENGTH = "all trials train equally long, so that they can be compared: write it under set"
_SAME_DATA = "every trial must be measured on the same data: write it under set"
_SAME_QUESTIONS = "it changes what every metric asks, so results of its values do not compare: write it under set"
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
    "training.cache_memory_gb": _NO_EFFECT,
    "training.compile": _NO_EFFECT,
    "training.feature_cache_type": "it says how features are kept: write it under set",
    "data.train_split": _SAME_DATA,
    "data.valid_split": _SAME_DATA,
    "data.annotation_file": _SAME_DATA,
    "data.categories": _SAME_DATA,
    "data.prompts": _SAME_QUESTIONS,
    "data.negative_prompts": _SAME_QUESTIONS,
    "data.exhaustive": "it is a fact about the annotations: write it under set",
}
"""Keys and sections that are the same for all trials, with the reason."""

CHANGES_VALIDATION_LOSS = (
    "training.loss",
    "training.num_negatives",
    "training.one_to_many",
    "model.resolution",
)
"""Keys and sections that change what the validation loss is made of, so that its values do not compare."""


def is_under(key: str, above: str) -> bool:
    """Whether a dotted key is another one, or in its section."""
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
    if reason := next((reason for above, reason in NOT_SEARCHED.items() if is_under(key, above)), None):
        raise ValueError(f"cannot be searched: {reason}")


def check_kind(parameter: Parameter, own_sets: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless the kind of parameter suits what its key holds, or a component set is unknown."""
    if parameter.key == COMPONENTS_KEY:
        if not isinstance(parameter, Choice) or parameter.labels is not None:
            raise ValueError("expected {choice: [...]} or {grid: [...]} of names of component sets")
        for name in parameter.values:
            if not isinstance(name, str):
                raise ValueError(f"expected names of component sets, got {short(repr(name))}: write it as a text")
            components_of(name, own_sets)
        return
    kind = number_type(parameter.key)
    if isinstance(parameter, Range | Tied) and kind is None:
        raise ValueError(f"{parameter.key} holds no number, so it cannot be {parameter.kind}: write choice")
    if isinstance(parameter, Uniform | LogUniform) and kind is int:
        raise ValueError(f"{parameter.key} is a whole number: write randint instead of {parameter.kind}")


def search_problems(parameters: Mapping[str, Parameter], search: Search) -> list[str]:
    """What is wrong with parameters that are searched in this way and compared by this metric, a line each."""
    problems = []
    visited: dict[str, Choice] = {key: item for key, item in parameters.items() if isinstance(item, Grid)}
    most = LARGEST_WHOLE
    if search.algorithm == "grid":
        visited = {key: item for key, item in parameters.items() if isinstance(item, Choice)}
        most = MOST_TRIALS
        problems += [
            f"parameters.{key}: algorithm grid tries every combination, and {item.kind} has no list of values: write "
            "grid or choice, or search with random"
            for key, item in parameters.items()
            if isinstance(item, Range)
        ]
    size = math.prod(item.count for item in visited.values())
    if size > most:
        problems.append(
            f"parameters: {', '.join(visited)} have {size:,} combinations, more than the {most:,} that can be gone "
            "through: list fewer values, or " + ("search with random" if most == MOST_TRIALS else "write choice")
        )
    if search.objective == "quality_and_size" and search.algorithm != "optuna":
        problems.append(
            f"search.objective quality_and_size needs algorithm optuna, got {search.algorithm}: change one of them"
        )
    if search.metric == "valid_loss":
        problems += [
            f"parameters.{key}: it changes what the validation loss measures, so losses of its values do not compare: "
            "choose metric map or cgf1"
            for key in parameters
            if any(is_under(key, above) for above in CHANGES_VALIDATION_LOSS)
        ]
    return problems


def tied_problems(parameters: Mapping[str, Parameter]) -> list[str]:
    """What is wrong with what parameters are tied to, a line each."""
    tied = {key: item.expression.keys for key, item in parameters.items() if isinstance(item, Tied)}
    problems = []
    for key, inputs in tied.items():
        reasons = [unknown_key(name) for name in inputs if name not in parameters]
        problems += [f"parameters.{key}: tied to {reason}" for reason in reasons if reason]
    try:
        TopologicalSorter(tied).prepare()
    except CycleError as error:
        path = " -> ".join(reversed(error.args[1]))
        problems.append(f"parameters are tied in a circle: {path}; give one of them values of its own")
    return problems


def refused_values(space: SearchSpace) -> list[str]:
    """Both ends of every range and every choice, each alone; one that is refused beside the base's values may still be
    possible beside other samples, so some of these are tried before it is called wrong."""
    if not space.free:
        return ["parameters are all tied, so there is nothing to search: give one of them values of its own"]
    rng = np.random.default_rng(0)
    base = {key: value for key, value in space.base_values().items() if key in space.free}
    samples = [base]
    for _ in range(_COMBINATIONS_TRIED):
        samples.append({key: item.draw(rng) for key, item in space.free.items()})
    if reason := _refused_beside_all(space, samples, {}):
        return [f"parameters: every combination is refused: {reason}"]
    problems = []
    for key, item in space.free.items():
        for value in item.extremes():
            if reason := _refused_beside_all(space, samples, {key: value}):
                problems.append(f"parameters.{key}: {short(value_text(value))} is refused: {reason}")
            if len(problems) == _MOST_REFUSED:
                return problems
    return problems


def _refused_beside_all(space: SearchSpace, samples: list[dict[str, Any]], fixed: dict[str, Any]) -> str | None:
    """Why the first sample is refused with these values in it; None if any sample is possible."""
    reasons = []
    for sample in samples:
        try:
            space.config_of(space.complete(sample | fixed))
            return None
        except UserError as error:
            reasons.append(str(error))
    return reasons[0]


def not_plain(raw: Any) -> list[str]:
    """What neither a configuration nor a record of a trial can hold, with its place."""
    problems: list[str] = []
    for number, problem in enumerate(_plain_walk(raw, "", ())):
        if number == _MOST_VALUES:
            return [*problems, f"more than {_MOST_VALUES:,} values: write fewer"]
        if problem is not None:
            problems.append(problem)
    return problems


def _plain_walk(value: Any, where: str, above: tuple[int, ...]) -> Iterator[str | None]:
    """A problem or None for each value in a value."""
    problem = None
    if isinstance(value, Mapping | list | tuple):
        if id(value) in above:
            problem = "holds itself by an anchor (&): write the values out"
        elif len(above) == _DEEPEST:
            problem = f"is nested more than {_DEEPEST} deep: write it flatter"
        else:
            for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                place = f"{where}.{name}" if where else str(name)
                is_key = name is None or isinstance(name, str | int | float)
                if not is_key or len(str(name)) > _LONGEST_KEY or not str(name).isprintable():
                    yield f"{short(place)}: a key is a text or number on one line of at most {_LONGEST_KEY} characters"
                else:
                    yield from _plain_walk(item, place, (*above, id(value)))
    elif isinstance(value, int):
        problem = "is a whole number too large for any setting" if abs(value) > LARGEST_WHOLE else None
    elif isinstance(value, float):
        problem = None if math.isfinite(value) else f"is {value}, expected a finite number"
    elif value is not None and not isinstance(value, str) and not (where == "base" and isinstance(value, Path)):
        problem = (
            f"is a {type(value).__name__}, expected a number, a text, true, false, null, a list or keys and values"
        )
    yield problem and f"{where or 'the file'} {problem}"


def names_folder(text: str) -> bool:
    """Whether a text is one plain component of a path."""
    is_plain = text.isprintable() and text == text.strip() and not set(text) & set("/\\")
    return is_plain and text not in ("", ".", "..") and len(text) <= _LONGEST_NAME


def split_in_use(split: str, base: Config) -> str | None:
    """``data.train_split`` or ``data.valid_split`` if that is the folder of a split, however it is written."""
    for key, used in (("data.train_split", base.data.train_split), ("data.valid_split", base.data.valid_split)):
        if os.path.normpath(split) == os.path.normpath(used):
            return key
        try:
            root = Path(base.training.data_dir or ".").expanduser()
            if base.training.data_dir and (root / split).samefile(root / used):
                return key
        except (OSError, RuntimeError, ValueError):  # not there yet
            continue
    return None


def unknown_key(key: str) -> str | None:
    """What is wrong with a dotted key that no configuration has, with the nearest one; None for a known key."""
    raw: dict[str, Any] = {}
    if not all(key.split(".")):
        return f'"{key}" is no dotted key such as lora.rank'
    if inner := next((name for name in known_keys() if name.startswith(f"{key}.")), None):
        return f"{key}: is a section; write one of its keys, such as {inner}"
    above = next((name for name in known_keys() if key.startswith(f"{name}.")), None)
    if above is not None and dict not in _types(_annotation(Config, above)):
        return f"{key}: unknown key; did you mean {above}?"
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
