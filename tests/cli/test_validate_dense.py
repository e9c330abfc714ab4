"""`sam3lora validate` of a dense folder, as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam3lora.cli import main

from ..evaluation.splits import write_split
from ..model.dense.dense_cases import write_dense
from .test_validate import external_references

BINARY = {
    "mae",
    "s_measure",
    "e_max",
    "e_mean",
    "f_max",
    "f_mean",
    "f_max_mirror",
    "weighted_f",
    "ber",
    "iou_per_image",
}
METRICS = {
    *("task", "mode", "num_images", "mean_iou", "mean_iou_foreground", "pixel_accuracy", "frequency_weighted_iou"),
    *("boundary_iou", "per_class", "intervals", "confusion", "settings", "seconds", "notes", "empty_with_foreground"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "gear"})
    return folder


@pytest.fixture(scope="module")
def folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("runs") / "mine" / "best", "binary")


def test_a_binary_folder(folder, data, tmp_path, capsys):
    words = ["validate", "--weights", folder, "--val-data-dir", data, "--output", tmp_path, "--threshold", 0.4]
    assert main([*map(str, words), "--paper-normalisation"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() >= METRICS | BINARY
    assert (metrics["task"], metrics["label"], metrics["num_images"]) == ("dense", "mine", 2)
    assert metrics["settings"]["threshold"] == 0.4
    assert metrics["settings"]["paper_normalisation"] is True
    assert f"{metrics['mean_iou']:.3f}" in out
    assert not external_references(tmp_path / "report.html")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        *("predictions/0.png", "predictions/1.png", "probabilities/0.png", "probabilities/1.png")
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--use-base-model"],
        ["--nms", "box"],
        ["--nms-iou", "0.5"],
        ["--merge"],
        ["--no-merge"],
        ["--merge-iou", "0.2"],
        ["--max-detections", "5"],
        ["--lowest-score", "auto"],
        ["--save-threshold", "overall"],
        ["--saco", "x.json"],
    ],
)
def test_options_of_prompts_are_refused(folder, data, tmp_path, capsys, words):
    given = ["validate", "--weights", folder, "--val-data-dir", data, "--output", tmp_path / "out"]
    assert main([*map(str, given), *words]) == 2
    error = capsys.readouterr().err
    assert "dense" in error
    assert words[0].replace("--no-", "--") in error
    assert not (tmp_path / "out").exists()


def test_the_other_way_round(folder, data, small_base, tmp_path, capsys):
    given = [*("--val-data-dir", str(data)), *("--output", str(tmp_path / "out"))]
    assert main(["validate", "--use-base-model", "--model", str(small_base), "--paper-normalisation", *given]) == 2
    assert "--paper-normalisation" in capsys.readouterr().err
    assert main(["validate", "--weights", str(folder), str(folder), *given]) == 2
    assert "one at a time" in capsys.readouterr().err
    assert main(["compare", "--weights", str(folder), *given]) == 2
    assert "dense" in capsys.readouterr().err
