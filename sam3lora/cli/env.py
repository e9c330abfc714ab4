"""`sam3lora env`: versions and hardware for a bug report."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3lora.cpus import usable_cpus

PACKAGES = (
    "sam3lora",
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "safetensors",
    "huggingface_hub",
    "ray",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "opencv-python-headless",
    "opencv-python",
    "pillow",
    "pycocotools",
    "pydantic",
    "typer",
    "fastapi",
    "optuna",
    "tensorboard",
)
BASE_MODEL = "facebook/sam3"
_GIB = 1024**3


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Versions and hardware for a bug report. No token, user or host name is printed.

    Example:  sam3lora env --json
    """
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_table(facts)


def collect() -> dict[str, Any]:
    """The facts that `sam3lora env` prints, as plain data; a value that cannot be determined is None."""
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.platform(), "machine": platform.machine()},
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": _cpu_model(), "count": os.cpu_count(), "usable": usable_cpus()},
        "memory": _memory(),
        "gpu": _gpus(),
        "hugging_face": _hugging_face(),
        "environment": {
            name: os.environ[name]
            for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RAY_AUTH_MODE")
            if name in os.environ
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "sam3lora":
            from .. import __version__

            return __version__
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _memory() -> dict[str, float | None]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return {"total_gib": None, "free_gib": None}
    return {"total_gib": round(total / _GIB, 1), "free_gib": round(free / _GIB, 1)}


def _gpus() -> dict[str, Any]:
    """The GPUs that torch sees. A failure to import torch is itself a fact for the report."""
    try:
        import torch
    except Exception as error:
        return {"error": f"torch cannot be imported: {error}"}
    facts: dict[str, Any] = {"cuda_build": torch.version.cuda, "cuda_available": torch.cuda.is_available()}
    facts["devices"] = []
    if facts["cuda_available"]:
        facts["cudnn"] = torch.backends.cudnn.version()
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": device.name,
                    "memory_gib": round(device.total_memory / _GIB, 1),
                    "capability": f"{device.major}.{device.minor}",
                }
            )
    return facts


def _hugging_face() -> dict[str, Any]:
    try:
        from huggingface_hub import constants, get_token
    except Exception as error:
        return {"error": f"huggingface_hub cannot be imported: {error}"}
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{BASE_MODEL.replace('/', '--')}" / "snapshots"
    return {
        "cache_exists": Path(constants.HF_HUB_CACHE).is_dir(),
        "base_model_cached": snapshots.is_dir() and any(snapshots.iterdir()),
        "token_present": get_token() is not None,
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for group, values in facts.items():
        for name, value in values.items():
            for index, text in enumerate(_lines(value)):
                table.add_row(f"{group}.{name}" if index == 0 else "", text)
    # A pipe has no width of its own, and folding lines at 80 columns makes a report hard to read.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _lines(value: Any) -> list[str]:
    if value is None:
        return ["-"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, list):
        return [", ".join(f"{key} {item}" for key, item in entry.items()) for entry in value] or ["none"]
    return [str(value)]
