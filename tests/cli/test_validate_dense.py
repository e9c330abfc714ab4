"""`sam3lora validate` of a dense folder, as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam3lora.cli import main

from ..evaluation.adapters import write_adapter
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
        ["--semantic"],
    ],
)
def test_options_of_prompts_are_refused(folder, data, tmp_path, capsys, words):
    given = ["validate", "--weights", folder, "--val-data-dir", data, "--output", tmp_path / "out"]
    assert main([*map(str, given), *words]) == 2
    error = capsys.readouterr().err
    assert "dense" in error
    assert words[0].replace("--no-", "--") in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_results_is_used_again(folder, data, spread_base, tmp_path, capsys):
    words = ["validate", "--weights", str(folder), "--val-data-dir", str(data), "--output", str(tmp_path)]
    assert main(words) == 0
    # Maps of other images, in mode binary: none of them stays.
    for place in ("predictions/sub/9.png", "probabilities/9.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"old")
    other = write_dense(spread_base, tmp_path / "other", "multilabel")
    assert main([*words[:2], str(other), *words[3:]]) == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert found == {f"predictions/{name}/{number}.png" for name in ("gear", "dirt") for number in (0, 1)}
    # Files that no evaluation has written stay.
    (tmp_path / "metrics.json").unlink()
    capsys.readouterr()
    assert main(words) == 2
    assert "another --output" in capsys.readouterr().err
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} == found


def test_the_other_way_round(folder, data, small_base, tmp_path, capsys):
    given = [*("--val-data-dir", str(data)), *("--output", str(tmp_path / "out"))]
    assert main(["validate", "--use-base-model", "--model", str(small_base), "--paper-normalisation", *given]) == 2
    assert "--paper-normalisation" in capsys.readouterr().err
    assert main(["validate", "--weights", str(folder), str(folder), *given]) == 2
    assert "one at a time" in capsys.readouterr().err
    assert main(["compare", "--weights", str(folder), *given]) == 2
    assert "two or more" in capsys.readouterr().err


def test_folders_are_compared_with_the_first(folder, data, spread_base, tmp_path, capsys):
    better = write_dense(spread_base, tmp_path / "better", "binary", threshold=0.3)
    words = ["compare", "--weights", folder, better, "--val-data-dir", data, "--output", tmp_path / "out"]
    assert main([*map(str, words)]) == 0
    capsys.readouterr()
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(comparison["models"]) == ["mine", "better"]
    assert list(comparison["differences_to_first"]) == ["better"]
    models = comparison["models"]
    for name in ("mean_iou", "pixel_accuracy", "mae"):
        found = comparison["differences_to_first"]["better"][name]
        assert found["difference"] == pytest.approx(models["better"][name] - models["mine"][name])
    assert comparison["differences_to_first"]["better"]["iou/crack"]["difference"] != 0
    assert models["better"]["settings"]["threshold"] == 0.3
    assert not external_references(tmp_path / "out" / "report.html")
    for label in ("mine", "better"):
        assert (tmp_path / "out" / label / "predictions" / "0.png").is_file()


def test_folders_that_cannot_be_compared(folder, data, small_base, spread_base, tmp_path, capsys):
    given = [*("--val-data-dir", str(data)), *("--output", str(tmp_path / "out"))]
    other = write_dense(spread_base, tmp_path / "other", "multiclass")
    assert main(["compare", "--weights", str(folder), str(other), *given]) == 2
    assert "red bolt" in capsys.readouterr().err
    detection = write_adapter(tmp_path / "detection", small_base)
    assert main(["compare", "--weights", str(folder), str(detection), *given]) == 2
    assert "one task" in capsys.readouterr().err
    assert main(["compare", "--weights", str(folder), str(folder), "--merge", *given]) == 2
    assert "--merge" in capsys.readouterr().err
