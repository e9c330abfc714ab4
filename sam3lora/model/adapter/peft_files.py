"""The two PEFT files of an adapter folder, ``adapter_config.json`` and ``adapter_model.safetensors``: reading, checks.

Pickles are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from sam3lora.errors import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FLOATING = {"F64", "F32", "F16", "BF16"}


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether the folder has the files of a complete adapter; they are not opened."""
    return all((Path(folder) / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder.

    Raises:
        UserError: A file is missing, or the configuration is not one of LoRA, or it would change the base model itself.
    """
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        note = f"; {', '.join(pickles)} is a pickle and is never loaded, save it as safetensors" if pickles else ""
        reason = f"lacks {', '.join(missing)}{note}" if folder.is_dir() else "does not exist"
        raise UserError(f"adapter folder {folder} {reason}. Expected a folder written by `sam3lora train` or by PEFT")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises several kinds for unknown types and fields
        raise UserError(f"{folder / CONFIG_FILE} is no valid PEFT configuration: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder} holds a {config.peft_type} adapter: expected LoRA")
    # The following settings change the base model's own weights or structure, or name code to import.
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{folder}: init_lora_weights={config.init_lora_weights!r} changes the base weights at loading; convert it "
            "to plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.bias != "none":
        raise UserError(
            f"{folder}: {CONFIG_FILE} sets bias={config.bias!r}, which changes the base's own biases and cannot be "
            'switched off: train the adapter with bias="none"'
        )
    for field in ("megatron_config", "layer_replication", "trainable_token_indices"):
        if getattr(config, field, None):
            raise UserError(f"{folder}: {CONFIG_FILE} sets {field}, which is not supported: remove it")
    config.init_lora_weights = True  # the values come from the file; other initialisations need data
    return config


def read_tensors(folder: Path, expected: Mapping[str, Sequence[int]] | None = None) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of an adapter's weights file, and the contents of the file.

    The names and shapes of ``expected`` floating-point tensors are compared with the file's header, before anything of
    their size is read. None accepts all.

    Raises:
        UserError: The file is damaged or empty, a tensor is not as expected, or a value is not finite.
    """
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as header:  # refuses a header that does not fit the size of the file
            slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118 - it is no mapping
            if not slices:
                raise UserError(f"{file} holds no tensors")
            if expected is not None:
                check_shapes(expected, {name: entry.get_shape() for name, entry in slices.items()}, folder)
                for name, entry in slices.items():
                    if entry.get_dtype() not in _FLOATING:
                        raise UserError(
                            f"{file}: {name} has dtype {entry.get_dtype()}: expected one of {sorted(_FLOATING)}"
                        )
        # Read, not mapped: if somebody truncates a mapped file later, the process is killed.
        contents = file.read_bytes()
        tensors = load(contents)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
    check_finite(tensors, str(file), UserError)
    return tensors, contents


def tensor_name(module: str, tensor: str) -> str:
    """Name in the file of a tensor of a module, ``lora_A.weight`` for example."""
    return f"base_model.model.{module}.{tensor}"


def lora_shapes(name: str, module: nn.Linear | nn.Conv2d, rank: int, use_dora: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the file holds for one adapted module."""
    weight = module.weight
    kernel = tuple(weight.shape[2:])
    ones = (1,) * len(kernel)
    shapes = {
        tensor_name(name, "lora_A.weight"): (rank, weight.shape[1], *kernel),
        tensor_name(name, "lora_B.weight"): (weight.shape[0], rank, *ones),
    }
    if use_dora:
        magnitude = (1, weight.shape[0], *ones) if kernel else (weight.shape[0],)
        shapes[tensor_name(name, "lora_magnitude_vector")] = magnitude
    return shapes


def check_finite(tensors: Mapping[str, Tensor], where: str, error: type[ValueError]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise error(f"{where}: {name} has NaN or infinite values, the training that made it diverged")


def check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Raise a UserError unless a weights file has exactly the expected tensors; both map a name to a shape."""
    problems = []
    for verb, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{verb} {len(names)} tensors, first {min(names)}")
    for name in sorted(expected.keys() & found.keys()):
        if tuple(expected[name]) != tuple(found[name]):
            problems.append(f"has {name} of shape {tuple(found[name])}, the model needs {tuple(expected[name])}")
            break
    if problems:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} and this base model: it {'; it '.join(problems)}. "
            "Use the base model the adapter was trained on"
        )
