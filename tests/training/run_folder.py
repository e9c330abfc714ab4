"""What a run has left in its folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from sam3lora.config import Config
from sam3lora.training.launch import TrainResult
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

Run = Config | TrainResult | Path


def folder_of(run: Run) -> Path:
    if isinstance(run, Config):
        return Path(run.output.output_dir)
    return run if isinstance(run, Path) else run.output_dir


def lines_of(run: Run, kind: str) -> list[dict]:
    """Lines of a kind in `metrics.jsonl`; complete ones only, as the file may be growing."""
    return [line for line in read_metrics(folder_of(run) / METRICS_FILE) if line["kind"] == kind]


def adapter_of(run: Run, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder_of(run) / name / "adapter_model.safetensors")


def checkpoints_of(run: Run) -> list[str]:
    return sorted(path.name for path in (folder_of(run) / "checkpoints").iterdir())


def passes_of(run: Run) -> tuple[int, int]:
    """Images through the vision tower, and images whose features were kept."""
    [end] = lines_of(run, "end")
    return end["vision_passes"], end["features_loaded"]


def without_measures(line: dict) -> dict:
    """A line without what differs from attempt to attempt: times, memory and counts."""
    measures = ("images_per_second", "data_wait_share", "memory_mb", "unix_time", "vision_passes", "features_loaded")
    return {key: value for key, value in line.items() if key not in measures}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Tensors of adapters or gradients are equal to the last bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
