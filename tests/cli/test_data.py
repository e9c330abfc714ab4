"""`sam3lora data` prints and writes what the data package reports."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from sam3lora.cli import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["data", "synth", str(folder), "--num-train", "10", "--num-valid", "5", "--size", "64"]) == 0
    return str(folder)


def replace(monkeypatch, module: str, function: str, report: object = None) -> dict:
    """Put a function that only records its arguments in place of the real one."""
    seen: dict = {}
    fake = types.ModuleType(module)
    setattr(fake, function, lambda *places, **options: seen.update(options, at=places) or report)
    monkeypatch.setitem(sys.modules, module, fake)
    return seen


def test_report_is_printed_and_written(scenes, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert main(["data", "check", scenes, "--json", str(path)]) == 0
    assert [split["num_images"] for split in json.loads(path.read_text())["splits"]] == [10, 5]
    assert "10 images" in capsys.readouterr().out


def test_report_as_json_alone(scenes, capsys):
    # for a pipe: nothing but JSON on standard output
    assert main(["data", "check", scenes, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["root"] == scenes


def test_report_that_cannot_be_written_is_one_message(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "check", scenes, "--json", str(tmp_path / "file" / "report.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_synth_passes_its_options(monkeypatch, tmp_path):
    seen = replace(monkeypatch, "sam3lora.data.synth.dataset", "write_dataset")
    words = ["data", "synth", str(tmp_path), "--num_train", "4", "--num-valid", "2", "--seed", "7", "--size", "112"]
    assert main([*words, "--num-test", "3"]) == 0
    counts = {"num_train": 4, "num_valid": 2, "num_test": 3}
    assert seen == {"at": (tmp_path,), **counts, "seed": 7, "size": 112, "domain": "shift"}


def test_convert_passes_its_options(monkeypatch):
    report = types.SimpleNamespace(to_dict=dict)
    seen = replace(monkeypatch, "sam3lora.data.convert", "convert_folder", report)
    words = ["data", "convert", "in", "out", "--from", "masks", "--to", "yolo", "--names", "crack", "pot hole"]
    assert main([*words, "--components", "--json", "-"]) == 0
    assert seen == {
        "at": (Path("in"), Path("out")),
        "source_format": "masks",
        "target_format": "yolo",
        "names": ["crack", "pot hole"],
        "instances": False,
        "components": True,
    }


def test_split_passes_its_options(monkeypatch):
    report = types.SimpleNamespace(to_dict=dict)
    seen = replace(monkeypatch, "sam3lora.data.split.splitting", "split_folder", report)
    assert main(["data", "split", "in", "out", "--group_by", "^(GX[0-9]+)_", "--json", "-"]) == 0
    assert seen == {
        "at": (Path("in"), Path("out")),
        "fractions": (0.8, 0.1, 0.1),
        "seed": 0,
        "group_by": "^(GX[0-9]+)_",
    }


def test_a_mistake_in_converting_is_one_message(tmp_path, capsys):
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_convert_and_split_for_real(scenes, tmp_path, capsys):
    # to YOLO, back, and split anew: no image is lost
    yolo, back, parts = (str(tmp_path / name) for name in ("yolo", "back", "parts"))
    assert main(["data", "convert", scenes, yolo, "--to", "yolo"]) == 0
    assert "coco -> yolo" in capsys.readouterr().out
    assert main(["data", "convert", yolo, back]) == 0
    capsys.readouterr()
    split = ["data", "split", back, parts, "--fractions", "0.6", "0.2", "0.2", "--seed", "3"]
    assert main([*split, "--json", str(tmp_path / "report.json")]) == 0
    assert "groups" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["splits"]) == ["train", "valid", "test"]
    assert sum(split["num_images"] for split in report["splits"].values()) == 15
