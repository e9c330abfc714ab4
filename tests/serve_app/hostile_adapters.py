"""Adapter folders as an attacker writes them: seeded variations of a good one."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "sam3lora.json"
SLOW_EXPRESSIONS = ("(.*)*(a+)+b", "(.*.*.*.*.*)+x", "(_|[a-z_.0-9])+#", "((.?)*)*#", "(?:.|.|.)+(?:.|.)+#", "(.*)+$x")
ODD_VALUES = (
    *(None, True, -1, 0, 1.5, "8", "", [], {}, [8], {"a": 1}, [[[]]], 10**30, 10**400, -(2**63)),
    *(math.nan, math.inf, -math.inf, "x" * 5000, "\ud800", "(", ["\x00"], [None], [["q_proj"]], SLOW_EXPRESSIONS[0]),
)
FIELDS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("use_dora", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("fan_in_fan_out", "peft_type", "task_type", "target_parameters", "eva_config", "loftq_config", "runtime_config"),
)
METADATA_FIELDS = ("prompts", "base_model", "base_fingerprint", "resolution", "geometry_cls", "post_processing", "data")


def write_hostile(root: Path, good: Path, count: int, seed: int) -> dict[str, str]:
    """Write so many folders into `root`, copies of `good` with one kind of change each; return id -> kind."""
    generator = np.random.default_rng(seed)
    kinds = list(_CHANGES)
    written = {}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        folder = root / f"{number:03d}-{kind}"
        shutil.copytree(good, folder)
        _CHANGES[kind](generator, folder)
        written[folder.name] = kind
    return written


def _edit(folder: Path, file: str = CONFIG, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _pick(generator: np.random.Generator, values: Any) -> Any:
    return values[int(generator.integers(len(values)))]


def _odd_config(generator: np.random.Generator, folder: Path) -> None:
    _edit(folder, **{_pick(generator, FIELDS): _pick(generator, ODD_VALUES)})


def _odd_metadata(generator: np.random.Generator, folder: Path) -> None:
    _edit(folder, METADATA, **{_pick(generator, METADATA_FIELDS): _pick(generator, ODD_VALUES)})


def _slow_expression(generator: np.random.Generator, folder: Path) -> None:
    slow = _pick(generator, SLOW_EXPRESSIONS)
    field = _pick(generator, ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers", "saved"))
    if field == "layers":
        _edit(folder, layers_to_transform=[1], layers_pattern=[slow])
    elif field == "saved":
        _edit(folder, modules_to_save=[slow])
    else:
        _edit(folder, **{field: {slow: 2} if field.endswith("pattern") else slow})


def _many(generator: np.random.Generator, folder: Path) -> None:
    names = [f"layers.{number}.q_proj" for number in range(int(generator.choice([4_000, 30_000, 200_000])))]
    field = _pick(generator, ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "prompts"))
    if field == "prompts":
        _edit(folder, METADATA, prompts=names, post_processing={"prompt_thresholds": dict.fromkeys(names, 0.4)})
    else:
        _edit(folder, **{field: dict.fromkeys(names, 2) if field.endswith("pattern") else names})


def _broken_json(generator: np.random.Generator, folder: Path) -> None:
    contents = (
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 200_000, b'{"a":' * 100_000),
        *(b" " * 20_000_000 + b"{}", b"[" + b"[]," * 500_000 + b"1]", b'{"r": ' + b"9" * 100_000 + b"}", b'{"r": NaN}'),
    )
    (folder / _pick(generator, (CONFIG, METADATA))).write_bytes(_pick(generator, contents))


def _values(generator: np.random.Generator, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    value = _pick(generator, (math.nan, math.inf, 1e10, 1e20, 1e30, 3e38, 1e-45))
    chosen = list(tensors) if generator.random() < 0.7 else [_pick(generator, list(tensors))]
    for name in chosen:
        tensors[name] = tensors[name] * value if math.isfinite(value) else torch.full_like(tensors[name], value)
    save_file(tensors, folder / WEIGHTS)
    _edit(folder, lora_alpha=_pick(generator, (1, 1e10, -1e30)))


def _shapes(generator: np.random.Generator, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = _pick(generator, list(tensors))
    change = _pick(generator, ("gone", "extra", "turned", "grown", "integers", "empty", "scalar"))
    tensor = tensors.pop(name)
    if change == "extra":
        tensors |= {name: tensor, "base_model.model." + "x" * 10_000: tensor.clone()}
    elif change != "gone":
        changed = {"turned": tensor.mT, "grown": torch.cat([tensor] * 3), "integers": tensor.to(torch.int8)}
        changed |= {"empty": tensor[:0], "scalar": tensor.sum()}
        tensors[name] = changed[change].contiguous()
    save_file(tensors, folder / WEIGHTS)


def _lying_header(generator: np.random.Generator, folder: Path) -> None:
    file = folder / WEIGHTS
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = _pick(generator, [name for name in header if name != "__metadata__"])
    lies = ("shape", "dtype", "data_offsets", "length", "size", "junk", "cut", "deep", "many", "sparse")
    lie = _pick(generator, lies)
    if lie in ("shape", "dtype", "data_offsets"):
        header[name][lie] = _pick(generator, ([2**40, 2**40], [-1, 4], [0, 10**12], "F64", "X", None, {}, [[]], 7))
    elif lie == "deep":
        header[name]["shape"] = json.loads("[" * 50 + "]" * 50)
    elif lie == "many":
        header |= {f"tensor {number}": header[name] for number in range(60_000)}
    text = json.dumps(header).encode()
    length = _pick(generator, (0, 1, 2**31, 2**62, 2**64 - 1)) if lie == "length" else len(text)
    content = struct.pack("<Q", length) + text + data
    if lie == "junk":
        content = struct.pack("<Q", 3_000_000) + bytes(generator.integers(0, 256, 3_000_100, dtype=np.uint8))
    if lie == "cut":
        content = content[: int(generator.integers(len(content)))]
    file.write_bytes(content)
    if lie in ("size", "sparse"):
        os.truncate(file, len(content) + (1 if lie == "size" else 40 * 2**30))


def _files(generator: np.random.Generator, folder: Path) -> None:
    file = folder / _pick(generator, (CONFIG, WEIGHTS, METADATA))
    file.unlink()
    kind = _pick(generator, ("pipe", "folder", "loop", "device", "outside", "gone", "dangling"))
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "gone":
        targets = {"loop": file.name, "device": "/dev/zero", "outside": "/etc/passwd", "dangling": "../nothing"}
        file.symlink_to(targets[kind])


_CHANGES: dict[str, Callable[[np.random.Generator, Path], None]] = {
    "config": _odd_config,
    "metadata": _odd_metadata,
    "expression": _slow_expression,
    "many": _many,
    "json": _broken_json,
    "values": _values,
    "shapes": _shapes,
    "header": _lying_header,
    "files": _files,
}
