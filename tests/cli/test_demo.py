"""The demo from nothing to a report, at a small size; it never replaces the content of other folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam3lora.cli.demo import MARKER, next_steps, run_demo


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
def test_whole_demo_and_again_in_the_same_folder(tmp_path: Path, small_base: Path, capsys):
    overrides = [f"model.name={small_base}", "training.num_epochs=2", "scaling.num_workers=0"]
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
