"""What makes a search space wrong: parameters that may not vary, do not go together or hold refused values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np

from sam3lora.config.metrics import METRICS, Task
from sam3lora.errors import UserError
from sam3lora.tune.space.component_sets import COMPONENTS_KEY, components_of
from sam3lora.tune.space.keys import CHANGES_VALIDATION_LOSS, NOT_SEARCHED, is_under, number_type, unknown_key
from sam3lora.tune.space.parameters import LARGEST_WHOLE, Choice, Parameter, Range, Tied, short, value_text
from sam3lora.tune.space.search_space import MOST_TRIALS, Search, SearchSpace

_COMBINATIONS_TRIED = 32
_MOST_REFUSED = 20


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
    """Raise ValueError unless the kind of parameter suits its key and every component set is known."""
    key, kind = parameter.key, parameter.kind
    if key == COMPONENTS_KEY:
        if not isinstance(parameter, Choice) or parameter.labels is not None:
            raise ValueError("expected {choice: [...]} or {grid: [...]} of names of component sets")
        for name in parameter.values:
            if not isinstance(name, str):
                raise ValueError(f"expected names of component sets, got {short(repr(name))}: write it as a text")
            components_of(name, own_sets)
    elif not isinstance(parameter, Choice):
        number = number_type(key)
        if number is None:
            raise ValueError(f"{key} holds no number, so it cannot be {kind}: write choice")
        if kind in ("uniform", "loguniform") and number is int:
            raise ValueError(f"{key} is a whole number: write randint instead of {kind}")


def search_problems(parameters: Mapping[str, Parameter], search: Search, task: Task) -> list[str]:
    """What is wrong with parameters that are searched in this way and compared by this metric, a line each."""
    others = METRICS[task]
    measured = ("valid_loss", *others)
    is_grid = search.algorithm == "grid"
    choices = {key: item for key, item in parameters.items() if isinstance(item, Choice)}
    visited = {key: item for key, item in choices.items() if is_grid or item.kind == "grid"}
    size, most = math.prod(item.count for item in visited.values()), MOST_TRIALS if is_grid else LARGEST_WHOLE
    problems = [
        f"parameters.{key}: algorithm grid tries every combination, and {item.kind} has no list of values: write grid "
        "or choice, or search with random"
        for key, item in parameters.items()
        if is_grid and isinstance(item, Range)
    ]
    if size > most:
        problems.append(
            f"parameters: {', '.join(visited)} have {size:,} combinations, expected at most {most:,}: list fewer "
            f"values, or {'search with random' if is_grid else 'write choice'}"
        )
    if search.objective == "quality_and_size" and search.algorithm != "optuna":
        problems.append(
            f"search.objective quality_and_size needs algorithm optuna, got {search.algorithm}: change one of them"
        )
    if search.metric not in measured:
        problems.append(
            f"search.metric {search.metric} is not measured with task {task}: write {' or '.join(measured)}"
        )
    if search.metric == "valid_loss":
        problems += [
            f"parameters.{key}: it changes what the validation loss measures, so losses of its values do not compare: "
            f"choose metric {' or '.join(others)}"
            for key in parameters
            if any(is_under(key, above) for above in CHANGES_VALIDATION_LOSS)
        ]
    return problems


def tied_problems(parameters: Mapping[str, Parameter]) -> list[str]:
    """What is wrong with the keys that tied parameters depend on, a line each."""
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
    """Choices and ends of ranges that no configuration accepts, a line each.

    A value that is refused beside the base's values may be possible beside others, so it is tried in some random
    samples before it is called wrong.
    """
    if not space.free:
        return ["parameters are all tied, so there is nothing to search: give one of them values of its own"]
    rng = np.random.default_rng(0)
    samples = [{key: value for key, value in space.base_values().items() if key in space.free}]
    samples += [{key: item.draw(rng) for key, item in space.free.items()} for _ in range(_COMBINATIONS_TRIED)]
    if reason := _refused_in_all(space, samples, {}):
        return [f"parameters: every combination is refused: {reason}"]
    problems = []
    for key, item in space.free.items():
        for value in item.extremes():
            if reason := _refused_in_all(space, samples, {key: value}):
                problems.append(f"parameters.{key}: {short(value_text(value))} is refused: {reason}")
            if len(problems) == _MOST_REFUSED:
                return problems
    return problems


def _refused_in_all(space: SearchSpace, samples: list[dict[str, Any]], fixed: dict[str, Any]) -> str | None:
    """Why the first sample is refused with these values in it; None if any sample is possible."""
    reasons = []
    for sample in samples:
        try:
            space.config_of(space.complete(sample | fixed))
            return None
        except UserError as error:
            reasons.append(str(error))
    return reasons[0]
