"""The demo from nothing to a report, small; and that it never replaces what is not its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import CLIPTokenizer, Sam3Model

from jobs.pretrain.tiny_model import initialise, tiny_config, write_tokenizer
from sam3lora.cli.demo_run import MARKER, next_steps, run_demo
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
    with pytest.raises(UserError, match="no folder of a demo"):
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
        result = run_demo(
            tmp_path / "a b's", num_train=number, num_valid=3, overrides=overrides, console=Console(width=100)
        )
    folder = result.report.parent
    # the second run replaced the first
    assert len(list((folder / "data" / "train").glob("*.jpg"))) == 5
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "data", "metrics.json", "report.html", "run"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {label: found["num_images"] for label, found in metrics["models"].items()} == {"base": 3, "adapter": 3}
    assert set(metrics["models"]["adapter"]["per_category"]) == {"gear", "arrow", "bolt", "capsule"}
    page = result.report.read_text()
    # labels, base and adapter of each image
    assert page.count("data:image/jpeg;base64,") == 3 * 3
    assert "<polyline" in page
    printed = capsys.readouterr().out
    assert "presence accuracy" in printed
    assert "What to do next" in printed
