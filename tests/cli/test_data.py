"""`sam3lora data` prints and writes what the data package reports."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

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

    module = types.ModuleType("sam3lora.data.check.report")
    module.check_folder = lambda folder: Report()
    monkeypatch.setitem(sys.modules, "sam3lora.data.check.report", module)


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
    module = types.ModuleType("sam3lora.data.synth.dataset")
    module.write_dataset = lambda folder, **options: seen.update(options, folder=folder)
    monkeypatch.setitem(sys.modules, "sam3lora.data.synth.dataset", module)
    words = ["data", "synth", str(tmp_path), "--num_train", "4", "--num-valid", "2", "--seed", "7", "--size", "112"]
    assert main([*words, "--num-test", "3"]) == 0
    counts = {"num_train": 4, "num_valid": 2, "num_test": 3}
    assert seen == {"folder": tmp_path, **counts, "seed": 7, "size": 112, "domain": "shift"}


def test_convert_passes_its_options(monkeypatch, tmp_path, capsys):
    seen = {}

    class Report:
        def to_dict(self):
            return {"target": "out"}

        def render(self, console):
            console.print("3 images")

    module = types.ModuleType("sam3lora.data.convert")
    module.convert_folder = lambda source, target, **options: seen.update(options, at=(source, target)) or Report()
    monkeypatch.setitem(sys.modules, "sam3lora.data.convert", module)
    words = ["data", "convert", "in", "out", "--from", "masks", "--to", "yolo", "--names", "crack", "pot hole"]
    assert main([*words, "--components", "--json", str(tmp_path / "report.json")]) == 0
    assert seen == {
        "at": (Path("in"), Path("out")),
        "source_format": "masks",
        "target_format": "yolo",
        "names": ["crack", "pot hole"],
        "instances": False,
        "components": True,
    }
    assert json.loads((tmp_path / "report.json").read_text()) == {"target": "out"}
    assert "3 images" in capsys.readouterr().out


def test_a_mistake_in_converting_is_one_message(tmp_path, capsys):
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no labels found" in error


def test_convert_and_split_for_real(tmp_path, capsys):
    # The synthetic set taken to YOLO, back, and divided anew: nothing is lost on the way.
    scenes, yolo, back, parts = (str(tmp_path / name) for name in ("scenes", "yolo", "back", "parts"))
    assert main(["data", "synth", scenes, "--num-train", "10", "--num-valid", "5", "--size", "64"]) == 0
    assert main(["data", "convert", scenes, yolo, "--to", "yolo"]) == 0
    assert main(["data", "convert", yolo, back]) == 0
    capsys.readouterr()
    assert main(["data", "split", back, parts, "--fractions", "0.6", "0.2", "0.2", "--seed", "3", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["splits"]) == ["train", "valid", "test"]
    assert sum(split["num_images"] for split in report["splits"].values()) == 15


def test_split_takes_its_usual_fractions_when_none_are_given(monkeypatch):
    seen = {}

    class Report:
        def render(self, console):
            pass

    module = types.ModuleType("sam3lora.data.split.splitting")
    module.split_folder = lambda source, target, **options: seen.update(options) or Report()
    monkeypatch.setitem(sys.modules, "sam3lora.data.split.splitting", module)
    assert main(["data", "split", "in", "out", "--group_by", "^(GX[0-9]+)_"]) == 0
    assert seen == {"fractions": (0.8, 0.1, 0.1), "seed": 0, "group_by": "^(GX[0-9]+)_"}
