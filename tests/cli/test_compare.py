"""`sam3lora compare` as people type it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam3lora.cli import main

from ..evaluation.adapters import write_adapter
from ..evaluation.splits import write_split
from .test_validate import declare_found, external_references, read, runner


@pytest.fixture(scope="module")
def runs(small_base, tmp_path_factory) -> Path:
    """Runs: `changed` answers otherwise than the base, `same` as it does."""
    folder = tmp_path_factory.mktemp("runs")
    write_adapter(folder / "changed" / "best", small_base)
    write_adapter(folder / "same" / "best", small_base, seed=None)
    return folder


@pytest.fixture(scope="module")
def data(small_base, tmp_path_factory) -> Path:
    """Four images; what the base finds first in the first three is declared to be a crack."""
    folder = tmp_path_factory.mktemp("data")
    split = write_split(folder / "valid", [(image, 1, 10) for image in range(3)], {1: "crack"}, num_images=4)
    asked = folder / "asked"
    words = ["--use-base-model", "--model", small_base, "--val-data-dir", folder, "--output", asked]
    assert main(["validate", *map(str, words)]) == 0
    declare_found(split, read(asked / "predictions.json"))
    return folder


@pytest.fixture
def compare(data, tmp_path, capsys):
    return runner("compare", data, tmp_path / "out", capsys)


def test_what_is_written(compare, runs):
    output, printed = compare("--weights", runs / "changed" / "best", "--semantic")
    assert sorted(path.name for path in output.iterdir()) == ["base", "changed", "comparison.json", "report.html"]
    for label in ("base", "changed"):
        assert sorted(path.name for path in (output / label).iterdir()) == ["metrics.json", "predictions.json"]
    comparison = read(output / "comparison.json")
    assert list(comparison["models"]) == ["base", "changed"]
    base, changed = (read(output / label / "metrics.json") for label in ("base", "changed"))
    assert base["map"] > changed["map"]
    interval = comparison["differences_to_base"]["changed"]["map"]
    assert interval["difference"] == pytest.approx(changed["map"] - base["map"])
    assert interval["low"] <= interval["difference"] <= interval["high"]
    assert f"{interval['difference']:+.3f}, 95 % interval {interval['low']:+.3f} to {interval['high']:+.3f}" in printed
    pixels = [comparison["models"][label]["semantic_mean_iou"] for label in ("base", "changed")]
    assert all(f"{value:.3f}" in printed for value in pixels)
    assert "semantic mean IoU" in printed
    # a report can be mailed: all it shows is in it
    assert external_references(output / "report.html") == []
    page = (output / "report.html").read_text()
    assert "data:image/" in page
    assert "changed" in page


def test_an_adapter_that_does_nothing_is_no_better(compare, runs):
    output, printed = compare("--weights", runs / "same" / "best")
    interval = read(output / "comparison.json")["differences_to_base"]["same"]["map"]
    assert (interval["difference"], interval["low"], interval["high"]) == (0, 0, 0)
    assert "includes zero" in printed
    assert read(output / "base" / "predictions.json") == read(output / "same" / "predictions.json")


def test_several_adapters_of_a_name(compare, runs, small_base, tmp_path):
    other = write_adapter(tmp_path / "changed" / "best", small_base, seed=3)
    output, printed = compare("--weights", runs / "changed" / "best", other, "--weights", runs / "same" / "best")
    labels = ["changed", "changed (2)", "same"]
    assert list(read(output / "comparison.json")["differences_to_base"]) == labels
    assert printed.count("95 % interval") == 3
    assert all(label in printed for label in labels)
    assert len([path for path in output.iterdir() if path.is_dir()]) == 4


def test_configuration_of_a_run(compare, data, runs, tmp_path):
    # it names data, adapter, categories and thresholds; options win
    (tmp_path / "run.yaml").write_text(
        f"training: {{data_dir: {data}}}\noutput: {{output_dir: {runs}/changed}}\n"
        "lora: {apply_to_detr_decoder: true}\n"
        "data: {categories: [crack], negative_prompts: [tree]}\n"
        "evaluation: {prob_threshold: 0.2, nms_iou: 0.8}\n"
    )
    output, _ = compare("--config", tmp_path / "run.yaml", "--num_samples", "2", "--nms-iou", "0.9", given=())
    for label in ("base", "changed"):
        metrics = read(output / label / "metrics.json")
        assert metrics["num_images"] == 2
        assert list(metrics["per_category"]) == ["crack", "tree"]
        assert (metrics["settings"]["threshold"], metrics["settings"]["nms_iou"]) == (0.2, 0.9)


def test_nothing_to_find(compare, runs, tmp_path):
    # differences of what cannot be measured are null, and the report is written all the same
    empty = write_split(tmp_path / "empty" / "valid", [], {1: "crack"})
    (tmp_path / "names.yaml").write_text("data: {categories: [crack]}\nlora: {apply_to_detr_decoder: true}\n")
    words = ("--config", tmp_path / "names.yaml", "--weights", runs / "changed" / "best")
    output, printed = compare(*words, given=("--val-data-dir", empty))
    assert read(output / "comparison.json")["differences_to_base"]["changed"]["map"]["difference"] is None
    assert "Note: map is null" in printed
    assert (output / "report.html").is_file()
