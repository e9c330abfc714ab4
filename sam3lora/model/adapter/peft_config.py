"""The configuration of an adapter: ``adapter_config.json`` as PEFT writes it, checked before PEFT sees it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from sam3lora.errors import UserError
from sam3lora.local_paths import refuse_bad_path
from sam3lora.model.adapter.folder_files import CONFIG_FILE, WEIGHTS_FILE, read_json_object, shown
from sam3lora.model.adapter.name_patterns import (
    MAX_EXPRESSION_CHARS,
    NamePattern,
    PatternError,
    is_plain_name,
)
from sam3lora.model.adapter.target_modules import ValuesByName

MAX_NAMES = 5_000  # SAM 3 has 553 modules that LoRA can adapt
MAX_NAME_CHARS = 200
MAX_EXPRESSIONS = 32


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder. Whatever it holds, using it takes bounded time.

    Raises:
        UserError: A file is missing, or the configuration is not one of LoRA, has a value of another type or beyond
            the bounds above, or would change the base model itself.
        OSError: The file cannot be read.
    """
    _check_files(folder)
    file = folder / CONFIG_FILE
    values = read_json_object(file)
    values.pop("runtime_config", None)  # PEFT leaves it out too
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{folder} holds a {shown(kind)} adapter: expected LoRA")
    for field, (expected, is_right) in _FIELDS.items():
        if values.get(field) is not None and not is_right(values[field]):
            raise UserError(f"{file}: {field} must be {expected}, got {shown(values[field])}: write what PEFT writes")
    _check_numbers(values, file)
    _check_expressions(values, file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fields of newer versions and of other initialisations
            config = LoraConfig.from_peft_type(**values)
    except Exception as error:  # PEFT raises several kinds for unknown types and fields
        raise UserError(f"{file} is no valid PEFT configuration: {str(error)[:300]}") from None
    _refuse_changes_of_the_base(config, folder)
    config.init_lora_weights = True  # the values come from the file; other initialisations need data
    return config


def _check_files(folder: Path) -> None:
    refuse_bad_path(folder, "the adapter folder")
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if not missing:
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))[:3]
    note = f"; {', '.join(pickles)} is a pickle and is never loaded, save it as safetensors" if pickles else ""
    reason = f"lacks {', '.join(missing)}{note}" if folder.is_dir() else "does not exist"
    raise UserError(f"adapter folder {folder} {reason}. Expected a folder written by `sam3lora train` or by PEFT")


def _refuse_changes_of_the_base(config: LoraConfig, folder: Path) -> None:
    """Refuse what changes the base model's own weights or structure, or names code to import."""
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{folder}: init_lora_weights={shown(config.init_lora_weights)} changes the base weights at loading; "
            "convert it to plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.bias != "none":
        raise UserError(
            f"{folder}: {CONFIG_FILE} sets bias={shown(config.bias)}, which changes the base's own biases and cannot "
            'be switched off: train the adapter with bias="none"'
        )
    for field in ("megatron_config", "layer_replication", "trainable_token_indices"):
        if getattr(config, field, None):
            raise UserError(f"{folder}: {CONFIG_FILE} sets {field}, which is not supported: remove it")


# ---- values -------------------------------------------------------------------------------------------------------


def is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1000


def _are_names(value: object) -> bool:
    """Names or ends of names, which PEFT compares as they are."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_NAMES
        and all(isinstance(name, str) and len(name) <= MAX_NAME_CHARS for name in value)
    )


def _are_plain_names(value: object) -> bool:
    """Names that PEFT puts into regular expressions of its own."""
    return _are_names(value) and all(map(is_plain_name, value))  # type: ignore[call-overload]


def _are_targets(value: object) -> bool:
    return _are_names(value) or (isinstance(value, str) and len(value) <= MAX_EXPRESSION_CHARS)


def _are_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= MAX_NAMES and all(
        isinstance(number, int) and not isinstance(number, bool) for number in numbers
    )


_NAMES = f"a list of at most {MAX_NAMES} names of at most {MAX_NAME_CHARS} characters"
_PLAIN_NAMES = f"{_NAMES}, of letters, digits and _ . -"
_TARGETS = f"{_NAMES}, or an expression of at most {MAX_EXPRESSION_CHARS} characters"
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "target_modules": (_TARGETS, _are_targets),
    "exclude_modules": (_TARGETS, _are_targets),
    "modules_to_save": (_PLAIN_NAMES, _are_plain_names),
    "target_parameters": (_PLAIN_NAMES, _are_plain_names),
    "layers_to_transform": ("a list of layer numbers", _are_layers),
    "layers_pattern": (_PLAIN_NAMES, lambda value: _are_plain_names([value] if isinstance(value, str) else value)),
    "base_model_name_or_path": ("a text", _is_text),
    "revision": ("a text", _is_text),
    "task_type": ("a text", _is_text),
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"), ("a bool", _is_bool)),
}
"""Field -> what its value must be, if it is there and not null, and whether it is."""


def _check_numbers(values: Mapping[str, Any], file: Path) -> None:
    """The ranks and alphas of single modules."""
    for field, expected, is_right in (
        ("rank_pattern", "a positive integer", is_rank),
        ("alpha_pattern", "a number", _is_number),
    ):
        patterns = values.get(field)
        if patterns is None:
            continue
        if not isinstance(patterns, dict) or len(patterns) > MAX_NAMES:
            raise UserError(
                f"{file}: {field} must be an object of at most {MAX_NAMES} names, got {shown(patterns)}: "
                "write what PEFT writes"
            )
        for key, value in patterns.items():
            if not is_right(value):
                raise UserError(f"{file}: {field} of {shown(key)} must be {expected}, got {shown(value)}")


def _check_expressions(values: Mapping[str, Any], file: Path) -> None:
    """Expressions on module names are of the kind that is matched in linear time, and few."""
    expressions = [
        (field, values[field]) for field in ("target_modules", "exclude_modules") if isinstance(values.get(field), str)
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = [key for key in values.get(field) or () if not is_plain_name(key.removeprefix("^").removesuffix("$"))]
        expressions += [(field, key) for key in keys]
    num_chars = sum(len(text) for _, text in expressions)
    if len(expressions) > MAX_EXPRESSIONS or num_chars > MAX_EXPRESSION_CHARS:
        raise UserError(
            f"{file} has {len(expressions)} expressions of {num_chars} characters on module names, expected at most "
            f"{MAX_EXPRESSIONS} of {MAX_EXPRESSION_CHARS} characters together: list the names of the modules instead"
        )
    for field, text in expressions:
        try:
            ValuesByName({text: None}) if field.endswith("_pattern") else NamePattern(text)
        except PatternError as error:
            raise UserError(
                f"{file}: {field} has {shown(text)}, which is no expression on module names: {error}. Expected names "
                r"such as q_proj, or an expression such as .*decoder.*\.(q|v)_proj: list the names of the modules"
            ) from None
