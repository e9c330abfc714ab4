"""Reading a search space: a short YAML file, checked as a whole before anything starts."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sam3lora.config import Config, load_config, preset_names
from sam3lora.config._section import Section
from sam3lora.config.keys import known_keys
from sam3lora.config.loading import describe_validation
from sam3lora.config.metrics import METRICS
from sam3lora.config.yaml_text import parse_yaml
from sam3lora.data.split_files import find_split
from sam3lora.errors import UserError
from sam3lora.tune.space.component_sets import COMPONENTS_KEY, read_own_sets
from sam3lora.tune.space.parameters import (
    LARGEST_NUMBER,
    LARGEST_WHOLE,
    Parameter,
    parse_parameter,
    short,
    value_text,
)
from sam3lora.tune.space.rules import check_key, check_kind, refused_values, search_problems, tied_problems
from sam3lora.tune.space.search_space import Constraints, EarlyStopping, Failures, Search, SearchSpace

_FILE_KEYS = ("name", "base", "base_name", "set", "parameters", "component_sets")
_MOST_PROBLEMS = 20  # that are listed
_LONGEST_NAME, _LONGEST_KEY, _DEEPEST, _MOST_VALUES = 100, 200, 20, 100_000


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
        source: The name of a shipped space, the path of a YAML file, or its content. A relative `base` is looked for
            beside the file first, then in the working directory.
        config: A preset's name or a YAML file that replaces the file's base.
        overrides: Texts `a.b=c` that change the base, after the file's `set`.
        num_trials, algorithm, metric, max_concurrent: Replace the file's keys of `search`.

    Raises:
        UserError: There is no such space, it is not YAML, or keys, values, parameters or the base are wrong; all
            problems are listed together.
    """
    raw, where, folder = _read_source(source)
    _raise_problems(where, _not_plain(raw))
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected keys such as base: and parameters:, got {short(value_text(raw))}")
    changes = {"num_trials": num_trials, "algorithm": algorithm, "metric": metric, "max_concurrent": max_concurrent}
    reader = _Reader(raw, folder, config, list(overrides), {k: v for k, v in changes.items() if v is not None})
    space = reader.read(Path(where).stem)
    if space is not None and not reader.problems:
        reader.problems += refused_values(space)
    _raise_problems(where, reader.problems)
    assert space is not None
    return space


def _raise_problems(where: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(f"{where}: {problems[0]}")
    if problems:
        shown, more = problems[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise UserError("\n  ".join([f"{where} has {len(problems)} problems:", *shown, *rest]))


def _read_source(source: str | Path | Mapping[str, Any]) -> tuple[Any, str, Path]:
    """The content, its name for error messages, and the folder that it is in."""
    if isinstance(source, Mapping):
        return source, "search space", Path()
    path, names = _file_at(Path(), source), space_names()
    if str(source) in names:
        text, folder = resources.files("tune_spaces").joinpath(f"{source}.yaml").read_text(encoding="utf-8"), Path()
    elif path is None:
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
    return parse_yaml(text, str(source)), str(source), folder


def _file_at(folder: Path, source: str | Path) -> Path | None:
    """The file of that name, from a folder on; None if there is none."""
    try:
        path = folder / Path(source).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # the name is too long, or ~user does not exist
        return None


def _not_plain(raw: Any) -> list[str]:
    """Values that neither a configuration nor the record of a trial can hold, a line each.

    The limits also stop YAML anchors (&) that hold themselves, or that multiply when they are written out.
    """
    problems: list[str] = []
    for number, problem in enumerate(_walk(raw, "", 0)):
        if number == _MOST_VALUES:
            return [*problems, f"more than {_MOST_VALUES:,} values: write fewer"]
        if problem is not None:
            problems.append(problem)
    return problems


def _walk(value: Any, where: str, depth: int) -> Iterator[str | None]:
    """A problem or None for each value in a value."""
    problem = None
    if isinstance(value, Mapping | list | tuple):
        if depth < _DEEPEST:
            for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                place = f"{where}.{name}" if where else str(name)
                is_key = name is None or isinstance(name, str | int | float)
                if is_key and len(str(name)) <= _LONGEST_KEY and str(name).isprintable():
                    yield from _walk(item, place, depth + 1)
                else:
                    yield f"{short(place)}: a key is a text or number on one line of at most {_LONGEST_KEY} characters"
        else:
            problem = f"is nested more than {_DEEPEST} deep: write it flatter"
    elif isinstance(value, int | float):
        if not abs(value) <= (LARGEST_WHOLE if isinstance(value, int) else LARGEST_NUMBER):
            problem = "is too large for any setting, or not a finite number"
    elif value is not None and not isinstance(value, str) and not (where == "base" and isinstance(value, Path)):
        problem = (
            f"is a {type(value).__name__}, expected a number, a text, true, false, null, a list or keys and values"
        )
    yield problem and f"{short(where) or 'the file'} {problem}"


def _names_folder(text: str) -> bool:
    """Whether a text is one plain component of a path."""
    is_plain = text.isprintable() and text == text.strip() and not set(text) & set("/\\")
    return is_plain and text not in ("", ".", "..") and len(text) <= _LONGEST_NAME


def _split_in_use(split: str, base: Config) -> str | None:
    """`data.train_split` or `data.valid_split` if that is the folder of a split, even under another path."""
    for key, used in (("data.train_split", base.data.train_split), ("data.valid_split", base.data.valid_split)):
        if os.path.normpath(split) == os.path.normpath(used):
            return key
        if base.training.data_dir and _is_same_split(Path(base.training.data_dir), split, used, base):
            return key
    return None


def _is_same_split(data_dir: Path, split: str, other: str, base: Config) -> bool:
    try:
        root = data_dir.expanduser()
        if (root / split).exists() and (root / other).exists():
            return (root / split).samefile(root / other)
        found, used = (find_split(root, name, base.data.annotation_file) for name in (split, other))
        return found is not None and used is not None and found.annotation_file.samefile(used.annotation_file)
    except (OSError, RuntimeError, ValueError):  # the data are not there yet
        return False


class _Reader:
    """Reads the parts of one file and collects what is wrong with them."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        folder: Path,
        config: str | Path | None,
        overrides: list[str],
        search: dict[str, Any],
    ) -> None:
        self.raw, self.folder, self.config, self.overrides = raw, folder, config, overrides
        self.search_changes = search
        self.problems: list[str] = []

    def read(self, stem: str) -> SearchSpace | None:
        """The space, or None if it cannot be made; `problems` then says why."""
        self.check_keys(self.raw, (*_FILE_KEYS, *_Sections.model_fields), "")
        own_sets, problems = read_own_sets(self.mapping("component_sets"))
        self.problems += problems
        parameters = self.parameters(own_sets)
        base, base_name = self.base(self.fixed(parameters))
        sections = self.sections()
        name = self.raw.get("name")
        name = ("sweep" if stem == "search space" else stem) if name is None else name
        if not isinstance(name, str | int | float) or not _names_folder(str(name)):
            self.problems.append(f"name should be a text that can name a folder, got {short(repr(name))}")
        if base is None or sections is None:
            return None
        search = sections.search
        if "metric" not in search.model_fields_set:
            search = search.model_copy(update={"metric": METRICS[base.task][0]})
        self.problems += tied_problems(parameters) + search_problems(parameters, search, base.task)
        parts = {field: getattr(sections, field) for field in _Sections.model_fields}
        parts["search"] = self.held_out(base, search)
        return SearchSpace(str(name), base, base_name, parameters, own_sets, **parts)

    def held_out(self, base: Config, search: Search) -> Search:
        """`search`, with a held-out split only if it is another folder than those of training and validation."""
        split = search.held_out_split
        if split is None:
            return search
        if not _names_folder(split):
            self.problems.append(
                f"search.held_out_split should be the name of a folder in training.data_dir, got {short(split)}"
            )
        elif key := _split_in_use(split, base):
            if "held_out_split" not in search.model_fields_set:
                return search.model_copy(update={"held_out_split": None})
            self.problems.append(
                f"search.held_out_split {split} is the folder of {key}, which the trials see: name another split, or "
                "write null"
            )
        return search

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
        self.problems.append(f"{key} should hold keys with values, got {short(value_text(value))}")
        return {}

    def check_keys(self, raw: Mapping[Any, Any], known: Iterable[str], prefix: str) -> None:
        known = list(known)
        for name in (str(name) for name in raw if name not in known):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"keys are {', '.join(known)}"
            self.problems.append(f"{prefix}{name}: unknown key; {hint}")

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
            if self.config is None and str(source) not in preset_names():
                source = _file_at(self.folder, source) or source
            name = str(source) if str(source) in preset_names() else Path(source).stem
        else:
            presets = ", ".join(preset_names())
            self.problems.append(f"base is missing: write a preset ({presets}), a YAML file or a configuration")
            return None, ""
        try:
            return load_config(source, changes), name
        except UserError as error:
            self.problems.append(f"base: {error}")
        except (OSError, RuntimeError) as error:
            self.problems.append(f"base: {short(str(source))} cannot be read: {short(str(error))}")
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


def _dotted(values: Mapping[Any, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys, so that `training: {num_epochs: 3}` changes that key and keeps the others."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _dotted(value, known, f"{key}.") if isinstance(value, Mapping) and key not in known else {key: value}
    return flat
