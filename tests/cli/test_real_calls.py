"""The verbs for real: what a user types, on a small random model and a few drawn images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam3lora.cli import main
from sam3lora.config import load_config, preset_names
from sam3lora.model.adapter.folder_files import is_adapter_folder
from tests.model.clicks.click_bases import write_click_base


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images, drawn by the command itself; read only."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    assert main(["data", "synth", str(folder), "--num-train", "4", "--num-valid", "2", "--size", "64"]) == 0
    return folder


def train_words(preset: str, base: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["train", preset, f"model.name={base}", "training.max_steps=2", "scaling.use_gpu=false", *more]
    return [*words, "--num-workers", "0", "--data-dir", str(data), "--output-dir", str(output)]


LIKE_ANOTHER = ("minimal", "light", "balanced", "production", "maximum")
"""Presets that do less than `full`, or differ from it in numbers only."""


@pytest.mark.parametrize(
    "preset",
    [pytest.param(one, marks=pytest.mark.slow if one in LIKE_ANOTHER else ()) for one in preset_names()],
)
def test_preset_runs(preset, shapes, small_base, tmp_path):
    base = small_base
    if load_config(preset).task == "clicks":
        base = write_click_base(tmp_path / "base", small_base)
    # Precision, checkpointing, augmentation, dropout and logging as shipped: they have to work together.
    run = tmp_path / preset
    few_layers = ["lora.vision_last_layers=1"] if load_config(preset).lora.vision_last_layers else []
    assert main(train_words(preset, base, shapes, run, *few_layers)) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["step"] == 2
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert epochs
    assert all(epoch["train_loss"] > 0 and epoch["valid_loss"] > 0 for epoch in epochs)
    # Every adapted module learns from the first step on.
    assert not [line for line in lines if line["kind"] == "warning"]
    for folder in ("best", "last"):
        assert is_adapter_folder(run / folder)
    assert (run / "plots" / "loss.png").is_file()
