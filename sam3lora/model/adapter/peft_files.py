"""The weights of an adapter folder, ``adapter_model.safetensors`` and such: reading and checks. No pickle is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder_files import CONFIG_FILE, WEIGHTS_FILE, open_regular, shown

MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 8 * 2**30
TENSOR_PREFIX = "base_model.model."
FLOATING = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that weights may have -> bytes of a value."""


class TensorEntry(NamedTuple):
    """What the header of a weights file says of a tensor; values may be of any type."""

    dtype: object
    shape: object


def read_header(folder: Path) -> dict[str, TensorEntry]:
    """The tensors that the weights file says it has, by name; nothing of their size is read.

    Raises:
        UserError: The file is no safetensors file, has no tensors, or is beyond the bounds above.
        OSError: It cannot be read.
    """
    file = folder / WEIGHTS_FILE
    with open_regular(file) as (opened, size):
        return _header(opened, size, file)


def read_tensors(
    folder: Path,
    expected: Mapping[str, Sequence[int]] | None = None,
    *,
    name: str = WEIGHTS_FILE,
    settings: str = CONFIG_FILE,
    types: Mapping[str, int] = FLOATING,
) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of an adapter's weights file, and the contents of the file.

    The names and shapes of ``expected`` tensors, which have these ``types``, are compared with the file's header,
    before anything of their size is read. None accepts all. ``settings`` is the file that they follow from.

    Raises:
        UserError: The file is damaged or empty, a tensor is not as expected, or a value is not finite.
        OSError: It cannot be read.
    """
    file = folder / name
    with open_regular(file) as (opened, size):
        entries = _header(opened, size, file)
        if expected is not None:
            shapes = {tensor: entry.shape for tensor, entry in entries.items()}
            check_shapes(expected, shapes, folder, file=name, settings=settings)
            _check_sizes(entries, expected, size, file, types)
        opened.seek(0)
        # Read, not mapped: if somebody truncates a mapped file later, the process is killed.
        contents = opened.read(size)
    try:
        tensors = load(contents)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {str(error)[:300]}") from None
    check_finite(tensors, str(file), UserError)
    return tensors, contents


def _header(opened: BinaryIO, size: int, file: Path) -> dict[str, TensorEntry]:
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{file} is damaged or not a safetensors file: its header does not fit into its {size} bytes")
    if length > MAX_HEADER_BYTES or size > MAX_WEIGHTS_BYTES:
        raise UserError(
            f"{file} is too large: expected at most {MAX_HEADER_BYTES} bytes of header and {MAX_WEIGHTS_BYTES} in all, "
            f"got {length} and {size}"
        )
    content = opened.read(length)
    if content.count(b"{") > MAX_TENSORS + 2 or content.count(b"[") > 2 * MAX_TENSORS:
        raise UserError(f"{file} has too many tensors: expected at most {MAX_TENSORS}")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged or not a safetensors file: its header is no JSON object")
    values.pop("__metadata__", None)
    if not values:
        raise UserError(f"{file} holds no tensors")
    if not all(isinstance(value, dict) for value in values.values()):
        raise UserError(f"{file} is damaged or not a safetensors file: its header does not describe tensors")
    return {name: TensorEntry(value.get("dtype"), value.get("shape")) for name, value in values.items()}


def _check_sizes(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, Sequence[int]],
    size: int,
    file: Path,
    types: Mapping[str, int],
) -> None:
    """The file is as long as its tensors of known shapes need, so that reading it takes no more memory than they do."""
    num_bytes = 0
    for name, entry in entries.items():
        if not isinstance(entry.dtype, str) or entry.dtype not in types:
            dtype = shown(entry.dtype).strip("'")
            raise UserError(f"{file}: {name} has dtype {dtype}: expected one of {sorted(types)}")
        num_bytes += torch.Size(expected[name]).numel() * types[entry.dtype]
    if not num_bytes <= size <= num_bytes + 8 + MAX_HEADER_BYTES:
        raise UserError(f"{file} is damaged: its tensors need {num_bytes} bytes, the file has {size}")


def tensor_name(module: str, tensor: str) -> str:
    """Name in the file of a tensor of a module, ``lora_A.weight`` for example."""
    return f"{TENSOR_PREFIX}{module}.{tensor}"


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


def check_shapes(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, object],
    folder: Path,
    *,
    file: str = WEIGHTS_FILE,
    settings: str = CONFIG_FILE,
) -> None:
    """Raise a UserError unless a weights file has exactly the expected tensors; both map a name to a shape."""
    problems = []
    for verb, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{verb} {len(names)} tensors, first {min(names)[:200]}")
    for name in sorted(expected.keys() & found.keys()):
        shape = _as_tuple(found[name])
        if tuple(expected[name]) != shape:
            problems.append(f"has {name} of shape {shown(shape)}, the model needs {tuple(expected[name])}")
            break
    if problems:
        raise UserError(
            f"{folder / file} does not fit {settings} and this base model: it {'; it '.join(problems)}. "
            "Use the base model the adapter was trained on"
        )


def _as_tuple(shape: object) -> object:
    return tuple(shape) if isinstance(shape, list | tuple) else shape
