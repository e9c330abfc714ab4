"""Dotted keys of a configuration: lookup, old and refused names, suggestions for unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from .aliases import REFUSED_KEYS, REFUSED_SECTIONS, RENAMED_KEYS
from .root import Config

RawConfig = dict[str, Any]

_SHORT_NAMES = {
    "lr": "training.learning_rate",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "epochs": "training.num_epochs",
    "patience": "training.early_stopping_patience",
}


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    annotation = field.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that takes a value, such as `training.loss.mask`, in the order of the models."""
    for name in model.model_fields:
        section = _section_of(model, name)
        if section is None:
            yield prefix + name
        else:
            yield from known_keys(section, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The known key that is most similar to a wrong one, or None.

    The same name in another section comes first, then a similar name in the same section, then one anywhere.
    """
    section, _, leaf = key.rpartition(".")
    if leaf in _SHORT_NAMES:
        return _SHORT_NAMES[leaf]
    known = list(known_keys())
    for candidates, cutoff in (
        ([k for k in known if _leaf(k) == leaf], 0.0),
        ([k for k in known if k.rpartition(".")[0] == section], 0.6),
        (known, 0.7),
    ):
        by_leaf = {_leaf(k): k for k in reversed(candidates)}
        close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff)
        if close:
            return by_leaf[close[0]]
    return None


def _unknown(key: str, *, is_section: bool) -> str:
    if is_section:
        names = list(Config.model_fields)
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"sections are {', '.join(names)}"
        return f"{key}: unknown section; {hint}"
    near = nearest_key(key)
    if near is not None:
        return f"{key}: unknown key; did you mean {near}?"
    section = key.rpartition(".")[0]
    names = [name.removeprefix(f"{section}.") for name in known_keys() if name.startswith(f"{section}.")]
    return f"{key}: unknown key; {section} has {', '.join(names)}"


def _refused(key: str, value: Any) -> list[str] | None:
    """Reasons to refuse a key of another trainer, one for each key of a section; None for any other key."""
    if key in REFUSED_KEYS:
        return [f"{key} has no effect here: {REFUSED_KEYS[key]}"]
    section = key.partition(".")[0]
    if section not in REFUSED_SECTIONS:
        return None
    if key == section and isinstance(value, dict) and value:
        return [reason for name, item in value.items() for reason in _refused(f"{key}.{name}", item) or []]
    return [f"{key} has no effect here: {REFUSED_SECTIONS[section]}"]


def rename_old_keys(raw: RawConfig) -> list[str]:
    """Replace old keys by their new names, in place; returns a line for each setting given twice: the first stays."""
    problems = []
    given: dict[str, str] = {}
    for old, new in RENAMED_KEYS.items():
        section, _, name = old.rpartition(".")
        values = raw.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        value = values.pop(name)
        if _leaf(new) in values:
            problems.append(f"{given.get(new, new)} and {old} are two names of one setting: keep {new}")
        else:
            values[_leaf(new)] = value
            given[new] = old
    return problems


def split_known(raw: RawConfig, model: type[BaseModel] = Config, prefix: str = "") -> tuple[RawConfig, list[str]]:
    """The known keys of nested mappings with their values, and a line for each unknown or refused key.

    A section that is None counts as empty. `prefix` is the dotted name of the section `model`, with a dot, or "".
    """
    known: RawConfig = {}
    problems: list[str] = []
    for name, value in raw.items():
        key = f"{prefix}{name}"
        section = _section_of(model, str(name))
        refused = _refused(key, value)
        if refused is not None:
            problems += refused
        elif section is not None and (value is None or isinstance(value, dict)):
            known[name], below = split_known(value or {}, section, f"{key}.")
            problems += below
        elif section is not None:
            problems.append(f"{key} should be a section with keys of its own, got {value!r}")
        elif name not in model.model_fields:
            problems.append(_unknown(key, is_section=not prefix))
        else:
            known[name] = value
    return known, problems


def set_key(raw: RawConfig, key: str, value: Any) -> None:
    """Set a dotted key, or the one that an old key became, in nested mappings, in place.

    What follows a key that takes a mapping is one name:

    `data.prompts.Type 0.5 mm=crack` sets the prompt of the category "Type 0.5 mm".
    """
    model: type[BaseModel] | None = Config
    here = raw
    rest = RENAMED_KEYS.get(key, key)
    while True:
        name, dot, below = rest.partition(".")
        section = _section_of(model, name) if model is not None else None
        takes_mapping = model is not None and section is None and name in model.model_fields
        if not dot:
            here[name] = value
            return
        inner = here.get(name)
        inner = dict(inner) if isinstance(inner, dict) else {}
        here[name] = inner
        if takes_mapping:
            inner[below] = value
            return
        here, rest, model = inner, below, section
