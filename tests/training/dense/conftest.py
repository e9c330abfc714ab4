"""Small dense runs: a random SAM 3 of 112 pixels and a handful of drawn images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3lora.config import Config

from ..short_runs import short_run
from .dense_runs import ADAPTERS

MakeConfig = Callable[..., Config]


@pytest.fixture
def make(lively_base: Path, scenes: Path, tmp_path: Path, monkeypatch) -> MakeConfig:
    """`make("lora", "a.b=c")` -> the configuration of a dense run in this process."""
    monkeypatch.setenv("SAM3LORA_CACHE", str(tmp_path / "cache"))

    def config(adapter: str = "lora", *overrides: str, output: str = "run") -> Config:
        sections = {"task": "dense", "evaluation": {"every_epochs": 1}, **ADAPTERS[adapter]}
        sections["dense"] = {"width": 32} | sections.get("dense", {})
        return short_run(lively_base, scenes, tmp_path / output, *overrides, **sections)

    return config
