"""Loading and checking a configuration from a preset, a file or mappings, with overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UserError
from .keys import RawConfig, known_keys, rename_old_keys, set_key, split_known
from .root import Config
from .yaml_text import parse_yaml

PRESETS_DIR = Path(__file__).parent / "presets"
_SHOWN_VALUE = 120


def preset_names() -> list[str]:
    """Names of the configurations that come with the package, in alphabetical order."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_config(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Read, complete and check a configuration.

    Args:
        source: A preset's name, the path of a YAML file, or nested mappings.
        overrides: Texts `a.b=c`, applied in order; c is YAML: `lora.rank=8`, `lora.target_modules=[q_proj]`.

    Returns:
        The configuration with all defaults filled in. Relative paths in it stay relative to the working directory.

    Raises:
        UserError: No such preset or file, not YAML, or wrong keys or values; all of them are listed together.
    """
    raw, where, stem = _read_source(source)
    problems = rename_old_keys(raw)
    problems += _apply_overrides(raw, overrides)
    problems += rename_old_keys(raw)  # in an override of a whole section
    known, unknown = split_known(raw)
    problems += unknown
    known.setdefault("lora", {})
    output = known.setdefault("output", {})
    if output.get("output_dir") is None:
        output["output_dir"] = f"outputs/{stem}"
    config = None
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        problems += describe_validation(error)
    if problems or config is None:
        raise UserError(_listed(where, problems))
    return config


def _read_source(source: str | Path | Mapping[str, Any]) -> tuple[RawConfig, str, str]:
    """The raw mappings, their name in error messages, and the name of the default output folder."""
    if isinstance(source, Mapping):
        return _copied(source), "configuration", "run"
    path = Path(source).expanduser()
    if str(source) in preset_names():
        path = PRESETS_DIR / f"{source}.yaml"
    elif not path.is_file():
        raise UserError(_no_source(str(source), path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as a text file: {error}") from None
    raw = parse_yaml(text, str(source))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected sections such as lora: and training:, got {_shown(raw)}")
    return raw, str(source), path.stem


def _copied(value: Any) -> Any:
    """Nested mappings as new dicts: overrides must not change those of the caller."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _no_source(source: str, path: Path) -> str:
    names = preset_names()
    presets = f"presets are {', '.join(names)}"
    if path.is_dir():
        return f"{source} is a folder: name a preset or a YAML file ({presets})"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return f"no configuration file at {path}; {presets}"
    close = difflib.get_close_matches(source, names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f'"{source}" is neither a preset nor a YAML file: {hint}{presets}'


def _apply_overrides(raw: RawConfig, overrides: Iterable[str]) -> list[str]:
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f'"{override}": expected an override such as lora.rank=8')
            continue
        try:
            value = parse_yaml(text, f'override "{override}"')
        except UserError as error:
            problems.append(str(error))
            continue
        if "." not in key and not isinstance(value, dict) and key not in known_keys():
            problems.append(f'"{override}": expected section.key=value, such as lora.rank=8')
            continue
        set_key(raw, key, value)
    return problems


_UNION_BRANCH = re.compile(r"constrained-\w+|literal\[.*\]")  # where pydantic was in a type such as float | "auto"


def describe_validation(error: ValidationError) -> list[str]:
    """One line for each wrong value: its key, the rule, the value."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if not _UNION_BRANCH.fullmatch(str(part)))
        kind, message = item["type"], item["msg"].removeprefix("Value error, ")
        message = message.replace("Input should", "should", 1).replace("a valid tuple", "a list")
        if kind.startswith(("int_", "float_", "bool_")):
            message = message.partition(",")[0]
        if kind == "value_error" and isinstance(item["input"], dict):
            # Checks of a whole section name their key themselves, and its content would bury the message.
            lines.append(f"{key}: {message}" if key else message)
        elif message.startswith("should"):
            lines.append(f"{key} {message}, got {_shown(item['input'])}")
        else:
            lines.append(f"{key}: {message}" + ("" if kind == "value_error" else f", got {_shown(item['input'])}"))
    return list(dict.fromkeys(lines))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}..."


def _listed(where: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return "\n  ".join([f"{where} has {len(problems)} problems:", *problems])
