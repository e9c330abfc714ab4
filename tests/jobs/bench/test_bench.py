"""The benchmarks run at tiny sizes, both ways do the same work, and the ratio is told. Times decide nothing here."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jobs.bench import postprocess
from jobs.bench.evaluation import compare_evaluation
from jobs.bench.models import small_config
from jobs.bench.postprocess import WAYS, Workload
from jobs.bench.processes import Measured
from jobs.bench.prompts import compare_prompts, compare_repeated
from jobs.bench.report import Comparison, Way, machine_line, time_in_turns
from sam3lora.errors import UserError

JOB = Path(__file__).parents[3] / "jobs/bench.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True)


def test_ratio_and_table():
    comparison = Comparison("work", [Way("ours", 1.0, 20.0), Way("plain", 4.0)], {"kept": 3})
    assert [way["ratio"] for way in comparison.to_dict()["ways"]] == [1.0, 0.25]
    console = Console(width=100, file=io.StringIO())
    comparison.print(console)
    text = console.file.getvalue()
    for words in ("work", "ours", "1.000", "20", "plain", "4.000", "0.250", "kept: 3", machine_line()[:20]):
        assert words in text


def test_ways_take_turns_and_warming_up_does_not_count():
    calls = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
    with pytest.raises(ValueError, match="positive, got 0"):
        time_in_turns({}, repeats=0)


def test_the_median_of_the_rounds_counts(monkeypatch):
    clock = [0.0]
    lasting = iter([5, 1, 9, 2])  # the first one warms up

    def run():
        clock[0] += next(lasting)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert time_in_turns({"a": run}, repeats=3) == {"a": 2}


def test_prompts_of_both_ways_find_the_same():
    found = compare_prompts("tiny", num_prompts=2, repeats=1, device="cpu")
    assert [way.name for way in found.ways] == [
        "sam3lora, 2 prompts at once",
        "transformers, 2 x 1 prompt",
        "transformers, the image encoded once by hand",
        "sam3lora, 2 x 1 prompt",
    ]
    assert found.facts["detections, sam3lora"] == found.facts["detections, transformers"] > 0
    # probabilities are enlarged there, logits here: outlines differ by a pixel here and there
    assert found.facts["mask pixels that differ"] < 1e-3
    assert found.facts["vision share of a single-prompt forward"] > 0


def test_kept_features_find_what_the_first_time_did():
    found = compare_repeated("tiny", num_prompts=2, repeats=1, device="cpu")
    assert [way.name for way in found.ways] == ["image features kept", "first time"]
    assert found.facts["detections, first time"] == found.facts["detections, features kept"] > 0


def test_the_small_model_is_mostly_vision():
    # its share of the time is measured in every run; here only that its size has not moved
    config = small_config()
    backbone = config.vision_config.backbone_config
    assert (config.image_size, backbone.num_hidden_layers, config.detr_decoder_config.num_queries) == (336, 28, 200)


def test_unknown_model():
    with pytest.raises(UserError, match="one of tiny, small, facebook/sam3, got 'huge'"):
        compare_prompts("huge")


@pytest.mark.parametrize("kind", ["blobs", "large"])
def test_both_ways_keep_and_encode_the_same_masks(kind):
    workload = Workload(kind, num_masks=8, mask_side=24, size_hw=(60, 80), num_kept=6)
    scores, logits = workload.draw()
    assert torch.equal(scores, scores.sort(descending=True).values)
    assert (logits > 0).flatten(1).any(1).all()
    # the last at the threshold is a copy of the first, and goes; two are below the threshold
    logits[5] = logits[0]
    ours, plain = (encode(scores, logits, workload.size_hw) for encode in WAYS.values())
    assert len(ours) == len(plain) == 5
    assert all(rle["size"] == [60, 80] for rle in ours + plain)


def test_masks_of_no_such_kind():
    with pytest.raises(UserError, match="blobs or large, got 'stars'"):
        Workload("stars")
    with pytest.raises(UserError, match="1 to 200, got 300"):
        Workload(num_kept=300)


SIZES = ["--masks", "5", "--kept", "2", "--mask-side", "16", "--height", "40", "--width", "50"]


def check_report(printed: str, path: Path) -> None:
    assert "sam3lora" in printed
    assert "ours / this" in printed
    reports = json.loads(path.read_text())
    assert [kind for found in reports for kind in ("blobs", "large") if kind in found["title"]] == [
        "blobs",
        "large",
    ] * 2
    for found in reports:
        assert [way["name"] for way in found["ways"]] == list(WAYS)
        assert all(way["seconds"] > 0 and way["ratio"] > 0 for way in found["ways"])
        assert found["facts"]["kept, sam3lora"] == found["facts"]["kept, plain"] > 0
        assert found["facts"]["mask pixels that differ"] < 0.05
        assert found["machine"]["threads"] >= 1
        if sys.platform == "linux":
            assert all(way["extra_mib"] >= 0 for way in found["ways"])


def test_the_job_tells_both_ways_and_the_ratio(tmp_path, monkeypatch):
    # in this process: starting one for each way takes longer than the work
    def measure(ways, *, rounds, **_):
        return {name: Measured((1.0,), 0.0, 1.0, (work.make(**work.arguments)(),)) for name, work in ways.items()}

    monkeypatch.setattr(postprocess, "measure_in_turns", measure)
    path = tmp_path / "new" / "found.json"
    result = CliRunner().invoke(runpy.run_path(str(JOB))["app"], ["postprocess", *SIZES, "--json", str(path)])
    assert result.exit_code == 0, result.output
    check_report(result.stdout, path)


@pytest.mark.slow
def test_the_job_in_processes_of_its_own(tmp_path):
    path = tmp_path / "found.json"
    result = run("postprocess", *SIZES, "--json", str(path))
    assert result.returncode == 0, result.stderr
    check_report(result.stdout, path)


@pytest.mark.slow
def test_both_ways_of_an_evaluation_find_the_same():
    found = compare_evaluation("tiny", num_images=2, num_prompts=2, repeats=1)
    assert found.facts["detections, sam3lora"] == found.facts["detections, transformers"] == 2 * 2 * 32
    assert found.facts["largest difference of scores"] < 1e-4
    assert found.facts["mAP, sam3lora"] == pytest.approx(found.facts["mAP, transformers"], abs=1e-3)
    assert found.facts["mAP, sam3lora"] > 0


@pytest.mark.parametrize("command", ["prompts", "postprocess"])
def test_the_job_runs_on_its_own(command):
    result = run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout


def test_a_mistake_of_the_user():
    result = run("prompts", "--model", "huge")
    assert result.returncode == 2
    assert "facebook/sam3" in result.stderr
    assert "Traceback" not in result.stderr
