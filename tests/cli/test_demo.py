"""The demo from nothing to a report, at a small size; it never replaces the content of other folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, Sam3Model

from jobs.pretrain.tiny_model import initialise, tiny_config, write_tokenizer
from sam3lora.cli.demo import MARKER, next_steps, run_demo
from sam3lora.errors import UserError


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocab_size = write_tokenizer(folder, ["gear"])
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    model = Sam3Model(tiny_config(vocab_size)).eval()
    initialise(model)
    model.save_pretrained(folder)
    return folder


def test_refuses_a_folder_of_another_kind(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--output"):
        run_demo(tmp_path)
    assert (tmp_path / "data" / "mine.txt").read_text() == "keep"


def test_a_wrong_override_is_found_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UserError, match="epochs"):
        run_demo(tmp_path / "demo", overrides=["training.epochs=1"])
    assert not (tmp_path / "demo").exists()


def test_next_steps_are_commands_that_exist():
    from typer.testing import CliRunner

    from sam3lora.cli.app import app

    for command, _ in next_steps():
        words = command.split()[1:]
        verb = words[:2] if words[0] == "data" else words[:1]
        result = CliRunner().invoke(app, [*verb, "--help"])
        assert result.exit_code == 0
        # each option shown is one of the verb's
        assert all(word in result.output for word in words if word.startswith("--"))


@pytest.mark.slow
def test_whole_demo_and_again_in_the_same_folder(tmp_path: Path, base_folder: Path, capsys):
    overrides = [f"model.name={base_folder}", "training.num_epochs=2", "scaling.num_workers=0"]
    for number in (6, 5):
        report = run_demo(tmp_path / "a b's", num_train=number, num_valid=3, overrides=overrides)
    folder = report.parent
    # The second run replaced the first.
    assert len(list((folder / "data" / "train").glob("*.jpg"))) == 5
    left = {MARKER, "data", "run", "base", "adapter", "comparison.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == left
    metrics = json.loads((folder / "adapter" / "metrics.json").read_text())
    assert metrics["num_images"] == 3
    assert set(metrics["per_category"]) == {"gear", "arrow", "bolt", "capsule"}
    assert "data:image/jpeg;base64," in report.read_text()
    assert (folder / "run" / "plots" / "loss.png").exists()
    printed = capsys.readouterr().out
    assert "presence accuracy" in printed
    assert "What to do next" in printed
