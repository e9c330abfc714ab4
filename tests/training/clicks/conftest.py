"""A small base with a tracker, and short runs of task clicks in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3lora.config import Config
from tests.model.clicks.click_bases import write_click_base

from ..short_runs import short_run


@pytest.fixture(scope="session")
def click_base(lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_click_base(tmp_path_factory.mktemp("clicks") / "base", lively_base)


@pytest.fixture
def make(click_base: Path, scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make("a.b=c")` -> the configuration of a run of task clicks."""

    def config(*overrides: str, output: str = "run") -> Config:
        targets = ["transformer", "output_hypernetworks_mlps"]
        sections = {
            "task": "clicks",
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": targets},
            "clicks": {"iterations": 1, "starts": {"mask": 0.5}},
            "evaluation": {"every_epochs": 1},
        }
        return short_run(click_base, scenes, tmp_path / output, *overrides, **sections)

    return config
