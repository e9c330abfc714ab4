"""Small dense runs: a random SAM 3 of 112 pixels and a handful of drawn images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3lora.config import Config, load_config

from .dense_runs import ADAPTERS

MakeConfig = Callable[..., Config]


@pytest.fixture
def make(lively_base: Path, scenes: Path, tmp_path: Path, monkeypatch) -> MakeConfig:
    """`make("lora", "a.b=c")` -> the configuration of a dense run in this process."""
    monkeypatch.setenv("SAM3LORA_CACHE", str(tmp_path / "cache"))

    def config(adapter: str = "lora", *overrides: str, output: str = "run") -> Config:
        source = {
            "task": "dense",
            "model": {"name": str(lively_base)},
            **ADAPTERS[adapter],
            "training": {
                "data_dir": str(scenes),
                "batch_size": 2,
                "num_epochs": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 2,
                "mixed_precision": "no",
                "logging_steps": 1,
            },
            "evaluation": {"every_epochs": 1},
            "scaling": {"num_workers": 0, "use_gpu": False},
            "output": {"output_dir": str(tmp_path / output)},
            "logging": {"progress": "off", "plots": False},
        }
        source["dense"] = {"width": 32} | source.get("dense", {})
        return load_config(source, overrides)

    return config
