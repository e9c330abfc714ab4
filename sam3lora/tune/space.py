"""Reading a search space: a short YAML file, checked as a whole before anything starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from sam3lora.config import Config, load_config, preset_names
from sam3lora.config._section import Section
from sam3lora.config.keys import known_keys
from sam3lora.config.loading import describe_validation
from sam3lora.config.yaml_text import parse_yaml
from sam3lora.errors import UserError
from sam3lora.tune.component_sets import COMPONENTS_KEY, check_own_sets
from sam3lora.tune.parameters import Parameter, Range, Tied, parse_parameter, value_text
from sam3lora.tune.search_space import Constraints, EarlyStopping, Failures, Search, SearchSpace
from sam3lora.tune.searchable import changes_validation_loss, check_key, check_kind, unknown_key

__all__ = ["SearchSpace", "load_space", "space_names"]

_KEYS = ("name", "base", "base_name", "set", "parameters", "component_sets", "constraints", "search", "early_stopping")
_FILE_KEYS = (*_KEYS, "failures")
_COMBINATIONS_TRIED = 32


class _Sections(Section):
    """The parts of a file with fixed keys."""

    constraints: Constraints = Field(default_factory=Constraints)
    search: Search = Field(default_factory=Search)
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    failures: Failures = Field(default_factory=Failures)


def space_names() -> list[str]:
    """Names of the search spaces that come with the package, in alphabetical order."""
    files = resources.files("tune_spaces").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_space(
    source: str | Path | Mapping[str, Any],
    *,
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    num_trials: int | None = None,
    algorithm: str | None = None,
    metric: str | None = None,
    max_concurrent: int | None = None,
) -> SearchSpace:
    """Read, complete and check a search space.

    Args:
        source: the name of a shipped space, the path of a YAML file, or its content. A relative `base` is looked for
            beside the file first, then in the working directory.
        config: a preset's name or a YAML file that replaces the file's base.
        overrides: texts `a.b=c` that change the base, after the file's `set`.
        num_trials, algorithm, metric, max_concurrent: replace the file's keys of `search`.

    Raises:
        UserError: there is no such space, it is not YAML, or keys, values, parameters or the base are wrong; all
            problems are listed together.
    """
    raw, where, folder = _read_source(source)
    changes = {"num_trials": num_trials, "algorithm": algorithm, "metric": metric, "max_concurrent": max_concurrent}
    reader = _Reader(raw, folder, config, list(overrides), {k: v for k, v in changes.items() if v is not None})
    space = reader.read(Path(where).stem)
    if space is not None and not reader.problems:
        reader.problems += _check_values(space)
    if reader.problems or space is None:
        if len(reader.problems) == 1:
            raise UserError(f"{where}: {reader.problems[0]}")
        raise UserError("\n  ".join([f"{where} has {len(reader.problems)} problems:", *reader.problems]))
    return space


def _read_source(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path]:
    """The content, what to call it in an error, and the folder that it is in."""
    if isinstance(source, Mapping):
        return dict(source), "search space", Path()
    path = Path(source).expanduser()
    names = space_names()
    if str(source) in names:
        text, folder = resources.files("tune_spaces").joinpath(f"{source}.yaml").read_text(encoding="utf-8"), Path()
    elif not path.is_file():
        close = difflib.get_close_matches(str(source), names, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise UserError(
            f'"{source}" is neither a search space nor a YAML file: {hint}search spaces are {", ".join(names)}'
        )
    else:
        try:
            text, folder = path.read_text(encoding="utf-8"), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: cannot be read as a text file: {error}") from None
    raw = parse_yaml(text, str(source))
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected keys such as base: and parameters:, got {value_text(raw)}")
    return raw, str(source), folder


class _Reader:
    """Reads the parts of one file and collects what is wrong with them."""

    def __init__(
        self,
        raw: dict[str, Any],
        folder: Path,
        config: str | Path | None,
        overrides: list[str],
        search: dict[str, Any],
    ) -> None:
        self.raw, self.folder, self.config, self.overrides = raw, folder, config, overrides
        self.search_changes = search
        self.problems: list[str] = []

    def read(self, stem: str) -> SearchSpace | None:
        """The space, or None where it cannot be made; what is wrong is in ``problems``."""
        self.check_keys(self.raw, _FILE_KEYS, "")
        own_sets = self.component_sets()
        parameters = self.parameters(own_sets)
        fixed = self.fixed(parameters)
        base, base_name = self.base(fixed)
        sections = self.sections()
        if base is None or sections is None:
            return None
        self.check_tied(parameters)
        self.check_search(parameters, sections.search)
        name = str(self.raw.get("name") or ("sweep" if stem == "search space" else stem))
        parts = {field: getattr(sections, field) for field in _Sections.model_fields}
        return SearchSpace(name, base, base_name, parameters, own_sets, **parts)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
        self.problems.append(f"{key} should hold keys with values, got {value_text(value)}")
        return {}

    def check_keys(self, raw: Mapping[Any, Any], known: Iterable[str], prefix: str) -> None:
        known = list(known)
        for name in (str(name) for name in raw if name not in known):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"keys are {', '.join(known)}"
            self.problems.append(f"{prefix}{name}: unknown key; {hint}")

    def component_sets(self) -> dict[str, tuple[str, ...]]:
        sets = {}
        for name, components in self.mapping("component_sets").items():
            if isinstance(components, list | tuple):
                sets[name] = tuple(map(str, components))
            else:
                self.problems.append(f'component_sets."{name}" should be a list of components, got {components!r}')
        self.problems += check_own_sets(sets)
        return sets

    def parameters(self, own_sets: dict[str, tuple[str, ...]]) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        written = self.mapping("parameters")
        if not written and not self.problems:
            self.problems.append("parameters is empty: name at least one, such as lora.rank: {choice: [4, 8, 16]}")
        for key, content in written.items():
            try:
                check_key(key, written)
                found[key] = parse_parameter(key, content)
                check_kind(found[key], own_sets)
            except ValueError as error:
                self.problems.append(f"parameters.{key}: {error}")
        return found

    def fixed(self, parameters: Mapping[str, Parameter]) -> list[str]:
        """The file's `set` and the overrides, as overrides of the base."""
        changes = _dotted(self.mapping("set"), set(known_keys()))
        texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
        for place, text in enumerate([*texts, *self.overrides]):
            key = text.partition("=")[0].strip()
            clash = COMPONENTS_KEY if key.startswith("lora.apply_to_") and COMPONENTS_KEY in parameters else key
            if clash in parameters:
                where = "set" if place < len(texts) else "the command line"
                self.problems.append(f"{key} is fixed by {where} and searched as the parameter {clash}: keep one")
        return [*texts, *self.overrides]

    def base(self, changes: list[str]) -> tuple[Config | None, str]:
        source = self.config or self.raw.get("base")
        if isinstance(source, Mapping):
            name = str(self.raw.get("base_name") or "configuration")
        elif isinstance(source, str | Path):
            beside = self.folder / Path(source).expanduser()
            if self.config is None and str(source) not in preset_names() and beside.is_file():
                source = beside
            name = str(source) if str(source) in preset_names() else Path(source).stem
        else:
            presets = ", ".join(preset_names())
            self.problems.append(f"base is missing: write a preset ({presets}), a YAML file or a configuration")
            return None, ""
        try:
            return load_config(source, changes), name
        except UserError as error:
            self.problems.append(f"base: {error}")
            return None, name

    def sections(self) -> _Sections | None:
        content: dict[str, Any] = {}
        for name, field in _Sections.model_fields.items():
            values = self.mapping(name)
            keys = field.annotation.model_fields  # type: ignore[union-attr]
            self.check_keys(values, keys, f"{name}.")
            content[name] = {key: value for key, value in values.items() if key in keys}
        content["search"] |= self.search_changes
        try:
            return _Sections.model_validate(content)
        except ValidationError as error:
            self.problems += describe_validation(error)
            return None

    def check_tied(self, parameters: Mapping[str, Parameter]) -> None:
        tied = {key: item.expression.keys for key, item in parameters.items() if isinstance(item, Tied)}
        for key, inputs in tied.items():
            for name in (name for name in inputs if name not in parameters):
                if reason := unknown_key(name):
                    self.problems.append(f"parameters.{key}: tied to {reason}")
        try:
            TopologicalSorter(tied).prepare()
        except CycleError as error:
            path = " -> ".join(reversed(error.args[1]))
            self.problems.append(f"parameters are tied in a circle: {path}; give one of them values of its own")

    def check_search(self, parameters: Mapping[str, Parameter], search: Search) -> None:
        if search.algorithm == "grid":
            for key, item in parameters.items():
                if isinstance(item, Range):
                    self.problems.append(
                        f"parameters.{key}: algorithm grid tries every combination, and {item.kind} has no list of "
                        "values: write grid or choice, or search with random"
                    )
        if search.objective == "quality_and_size" and search.algorithm != "optuna":
            self.problems.append(
                f"search.objective quality_and_size needs algorithm optuna, got {search.algorithm}: change one of them"
            )
        if search.metric == "valid_loss":
            for key in filter(changes_validation_loss, parameters):
                self.problems.append(
                    f"parameters.{key}: it changes what the validation loss measures, so losses of its values do not "
                    "compare: choose metric map or cgf1"
                )


def _dotted(values: Mapping[Any, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys, so that `training: {num_epochs: 3}` changes that key and keeps the others."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _dotted(value, known, f"{key}.") if isinstance(value, Mapping) and key not in known else {key: value}
    return flat


def _check_values(space: SearchSpace) -> list[str]:
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
                problems.append(f"parameters.{key}: {value_text(value)} is refused: {reason}")
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
