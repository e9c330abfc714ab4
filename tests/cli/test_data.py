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


def test_report_is_printed_and_written(scenes, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert main(["data", "check", scenes, "--json", str(path)]) == 0
    assert [split["num_images"] for split in json.loads(path.read_text())["splits"]] == [10, 5]
    assert "10 images" in capsys.readouterr().out


def test_report_as_json_alone(scenes, capsys):
    # for a pipe: nothing but JSON on standard output
    assert main(["data", "check", scenes, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["root"] == scenes


@pytest.mark.parametrize(
    ("where", "words", "expected"),
    [
        (
            "synth.dataset.write_dataset",
            "synth out --num_train 4 --num-valid 2 --seed 7 --size 112 --num-test 3",
            {"num_train": 4, "num_valid": 2, "num_test": 3, "seed": 7, "size": 112, "domain": "shift"},
        ),
        (
            "convert.convert_folder",
            "convert in out --from masks --to yolo --names crack hole --components --json -",
            {"source_format": "masks", "target_format": "yolo", "names": ["crack", "hole"]}
            | {"instances": False, "components": True},
        ),
        (
            "split.splitting.split_folder",
            "split in out --group_by ^(GX[0-9]+)_ --json -",
            {"fractions": (0.8, 0.1, 0.1), "seed": 0, "group_by": "^(GX[0-9]+)_"},
        ),
    ],
)
def test_options_reach_the_function(where, words, expected, monkeypatch):
    seen: dict = {}
    report = types.SimpleNamespace(to_dict=dict)
    name, _, function = f"sam3lora.data.{where}".rpartition(".")
    module = types.ModuleType(name)
    setattr(module, function, lambda *places, **options: seen.update(options, places=places) or report)
    monkeypatch.setitem(sys.modules, name, module)
    assert main(["data", *words.split()]) == 0
    assert seen.pop("places") == tuple(Path(word) for word in ("in", "out") if f" {word} " in words)
    assert seen == expected


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
