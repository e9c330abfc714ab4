"""Which modules a LoRA configuration adapts, and with which rank and alpha: as PEFT decides it, in bounded time.

PEFT matches names by Python's regular expressions; here :class:`~sam3lora.model.adapter.name_patterns.NamePattern` does
it. The one difference: in a key without any other mark, a dot is a dot.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Generic, TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from sam3lora.model.adapter.name_patterns import NamePattern, is_plain_name

_ALL_LINEAR = "all-linear"

T = TypeVar("T")


class ValuesByName(Generic[T]):
    """`rank_pattern` or `alpha_pattern`: of the keys that match a name or its end, the first one counts.

    Raises:
        PatternError: A key is neither a name nor an expression.
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self._values = list(patterns.values())
        self._of_end: dict[str, int] = {}
        self._of_name: dict[str, int] = {}
        self._expressions: list[tuple[int, NamePattern]] = []
        for number, key in enumerate(patterns):
            plain = key.removeprefix("^").removesuffix("$")
            if is_plain_name(plain):
                (self._of_name if key.startswith("^") else self._of_end).setdefault(plain, number)
            else:
                self._expressions.append((number, NamePattern(rf"(?:.*\.)?(?:{key})")))

    def get(self, name: str, default: T) -> T:
        found = [number for number, pattern in self._expressions if pattern.matches(name)]
        found += [self._of_end[end] for end in _ends(name) if end in self._of_end]
        found += [self._of_name[name]] if name in self._of_name else []
        return self._values[min(found)] if found else default


def base_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base model by name; PEFT's layers that are there already stand for what they wrap."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        if name and not name.startswith(inside):
            found[name] = module
    return found


def adapted_names(config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that PEFT would adapt, in the order of `modules`, which are those of `base_modules`.

    Raises:
        PatternError: A field is neither a name nor an expression.
    """
    targets: str | Collection[str] = config.target_modules or ()
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        targets = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    is_target, is_excluded = _Names(targets), _Names(config.exclude_modules or ())
    saved = frozenset(config.modules_to_save or ())
    return [
        name
        for name in modules
        if is_target(name)
        and not is_excluded(name)
        and not any(saved.intersection(_ends(begin)) for begin in _begins(name) if saved)
        and _in_layers(config, name)
    ]


@contextmanager
def exactly(config: LoraConfig, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block the configuration names its modules one by one, so that PEFT has nothing to search.

    Raises:
        PatternError: A field is neither a name nor an expression.
    """
    names = adapted_names(config, modules)
    exact = {
        "target_modules": _any_of(names) if names else None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _by_value(names, ValuesByName(config.rank_pattern or {})),
        "alpha_pattern": _by_value(names, ValuesByName(config.alpha_pattern or {})),
    }
    before = {field: getattr(config, field) for field in exact}
    try:
        for field, value in exact.items():
            setattr(config, field, value)
        yield
    finally:
        for field, value in before.items():
            setattr(config, field, value)


def _by_value(names: Collection[str], values: ValuesByName[T]) -> dict[str, T]:
    grouped: dict[T, list[str]] = {}
    unset = object()
    for name in names:
        value = values.get(name, unset)  # type: ignore[arg-type]
        if value is not unset:
            grouped.setdefault(value, []).append(name)
    return {f"^{_any_of(group)}": value for value, group in grouped.items()}


def _any_of(names: Collection[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


class _Names:
    """An expression for whole names, or a collection of names and ends of names."""

    def __init__(self, wanted: str | Collection[str]) -> None:
        self._pattern = NamePattern(wanted) if isinstance(wanted, str) else None
        self._ends = frozenset() if isinstance(wanted, str) else frozenset(wanted)

    def __call__(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(name)
        return not self._ends.isdisjoint(_ends(name))


def _ends(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    return [name, *(name[at + 1 :] for at, char in enumerate(name) if char == ".")]


def _begins(name: str) -> list[str]:
    return [*(name[:at] for at, char in enumerate(name) if char == "."), name]


def _in_layers(config: LoraConfig, name: str) -> bool:
    """Whether `layers_to_transform` has the layer of the name; its search is quick, as the patterns are plain names."""
    if config.layers_to_transform is None or name in (config.target_modules or ()):
        return True
    asked = SimpleNamespace(
        target_modules={name.rpartition(".")[2]},
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(asked, name))
