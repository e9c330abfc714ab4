"""`sam3lora data` prints and writes what the data package reports."""

from __future__ import annotations

import json
import sys
import types

import pytest

from sam3lora.cli import main


@pytest.fixture
def check(monkeypatch):
    """Stands in for the checker."""

    class Report:
        def to_dict(self):
            return {"images": 3}

        def render(self, console):
            console.print("3 images")

    module = types.ModuleType("sam3lora.data.check")
    module.check_folder = lambda folder: Report()
    monkeypatch.setitem(sys.modules, "sam3lora.data.check", module)


def test_report_is_shown(check, capsys):
    assert main(["data", "check", "folder"]) == 0
    assert "3 images" in capsys.readouterr().out


def test_report_is_written_too(check, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert main(["data", "check", "folder", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == {"images": 3}
    assert "3 images" in capsys.readouterr().out


def test_report_as_json_alone(check, capsys):
    # For a pipe: nothing but JSON on standard output.
    assert main(["data", "check", "folder", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 3}


def test_synth_passes_its_options(monkeypatch, tmp_path):
    seen = {}
    module = types.ModuleType("sam3lora.data.synth")
    module.write_dataset = lambda folder, **options: seen.update(options, folder=folder)
    monkeypatch.setitem(sys.modules, "sam3lora.data.synth", module)
    words = ["data", "synth", str(tmp_path), "--num_train", "4", "--num-valid", "2", "--seed", "7", "--size", "112"]
    assert main(words) == 0
    assert seen == {"folder": tmp_path, "num_train": 4, "num_valid": 2, "seed": 7, "size": 112, "domain": "shift"}
