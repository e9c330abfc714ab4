"""The verbs for real: what a user types, on a small random model and a few drawn images."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sam3lora.cli import main
from sam3lora.config import preset_names


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images, drawn by the command itself; read only."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    assert main(["data", "synth", str(folder), "--num-train", "4", "--num-valid", "2", "--size", "64"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _restore_log_level():
    logger = logging.getLogger("sam3lora")
    level = logger.level
    yield
    logger.setLevel(level)


def train_words(preset: str, base: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["train", preset, f"model.name={base}", "training.max_steps=2", "scaling.use_gpu=false", *more]
    return [*words, "--num-workers", "0", "--data-dir", str(data), "--output-dir", str(output)]


def test_drawn_data_pass_the_check(shapes, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["data", "check", str(shapes), "--json", str(path)]) == 0
    assert capsys.readouterr().out.strip()
    report = json.loads(path.read_text())
    counts = {split["name"]: split["num_images"] for split in report["splits"]}
    assert counts == {"train": 4, "valid": 2}


def test_synth_overwrites_nothing(shapes, capsys):
    before = sorted(shapes.rglob("*"))
    assert main(["data", "synth", str(shapes), "--num-train", "1", "--num-valid", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(shapes.rglob("*")) == before


@pytest.mark.parametrize("verb", [["data", "check"], ["train", "quick_test", "--num-workers", "0", "--data-dir"]])
def test_missing_data_folder_is_the_users_mistake(verb, tmp_path, capsys):
    missing = str(tmp_path / "nowhere")
    assert main([*verb, missing]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "Traceback" not in error


def test_training_ends_with_an_adapter_and_is_not_repeated_by_accident(shapes, small_base, tmp_path, capsys):
    words = train_words("quick_test", small_base, shapes, tmp_path / "run")
    assert main(words) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()
    weights = (tmp_path / "run" / "best" / "adapter_model.safetensors").read_bytes()
    # The same words again would overwrite the result.
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").read_bytes() == weights


def test_training_goes_on_with_resume(shapes, small_base, tmp_path):
    run = tmp_path / "run"
    assert main(train_words("quick_test", small_base, shapes, run, "training.save_steps=1")) == 0
    assert main([*train_words("quick_test", small_base, shapes, run, "training.max_steps=4"), "--resume"]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == [1, 2, 3, 4]


def test_resume_without_a_run_is_the_users_mistake(shapes, small_base, tmp_path, capsys):
    assert main([*train_words("quick_test", small_base, shapes, tmp_path / "run"), "--resume"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("preset", preset_names())
def test_preset_runs(preset, shapes, small_base, tmp_path):
    # Precision, checkpointing, augmentation, dropout and logging as shipped: they have to work together.
    run = tmp_path / preset
    assert main(train_words(preset, small_base, shapes, run)) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["step"] == 2
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert epochs
    assert all(epoch["train_loss"] > 0 and epoch["valid_loss"] > 0 for epoch in epochs)
    # Every adapted module learns from the first step on.
    assert not [line for line in lines if line["kind"] == "warning"]
    for folder in ("best", "last"):
        assert (run / folder / "adapter_config.json").is_file()
    assert (run / "plots" / "loss.png").is_file()


def test_environment_report(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for package in ("torch", "transformers", "peft", "ray"):
        assert package in out
