"""A small base with a tracker, and short runs of task clicks in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3lora.config import Config, load_config
from tests.model.clicks.click_bases import write_click_base


@pytest.fixture(scope="session")
def click_base(lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_click_base(tmp_path_factory.mktemp("clicks") / "base", lively_base)


@pytest.fixture
def make(click_base: Path, scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make("a.b=c")` -> the configuration of a run of task clicks."""

    def config(*overrides: str, output: str = "run") -> Config:
        source = {
            "task": "clicks",
            "model": {"name": str(click_base)},
            "lora": {
                "rank": 4,
                "alpha": 8,
                "dropout": 0.0,
                "target_modules": ["transformer", "output_hypernetworks_mlps"],
            },
            "clicks": {"iterations": 1, "starts": {"mask": 0.5}},
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
        return load_config(source, overrides)

    return config
