"""Configurations of short runs in this process, on a handful of drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3lora.config import Config, load_config


def short_run(base: Path, data: Path, output_dir: Path, *overrides: str, **sections: dict[str, Any] | str) -> Config:
    """A run with the given sections; keys of `training` are added to those of every short run."""
    training = {
        "data_dir": str(data),
        "batch_size": 2,
        "num_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "mixed_precision": "no",
        "logging_steps": 1,
    }
    own = sections.pop("training", {})
    assert isinstance(own, dict)
    source = {
        "model": {"name": str(base)},
        "training": training | own,
        "scaling": {"num_workers": 0, "use_gpu": False},
        "output": {"output_dir": str(output_dir)},
        "logging": {"progress": "off", "plots": False},
    }
    return load_config(source | sections, overrides)
