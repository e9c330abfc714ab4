"""Every benchmark runs once at a tiny size, and both ways do the same work; times decide nothing here."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.bench import (
    adapters,
    cost_model,
    data,
    data_wait,
    evaluation,
    feature_cache,
    large_data,
    large_split,
    postprocess,
    scaling,
    training,
)
from jobs.bench.collectives import time_collectives
from jobs.bench.cost_model import FITTED, Setting, StepCost
from jobs.bench.load import NO_ANSWER, LoadResult, LoadSample
from jobs.bench.models import CONFIGS
from jobs.bench.processes import Measured
from jobs.bench.report import BenchReport, Timing, time_in_turns
from jobs.bench.scaling import ALONE, APART, TOGETHER, ScalingWork, compare_scaling
from jobs.bench.serving_report import Rows, ServingReport
from jobs.bench.tensor_memory import TensorMemory

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
JOB = REPOSITORY / "jobs/bench.py"
USES_PROCESSES = (
    adapters,
    cost_model,
    data,
    data_wait,
    evaluation,
    feature_cache,
    large_data,
    large_split,
    postprocess,
    scaling,
    training,
)


# ---- every command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process for each way takes longer than its work; the small model is as small as the tiny one."""

    def measure(ways, *, rounds, **_):
        rows = {}
        for name, work in ways.items():
            run = work.make(**work.arguments)
            rows[name] = Measured((0.5,) * rounds, 0.0, 1.0, tuple(run() for _ in range(rounds)))
        return rows

    for module in USES_PROCESSES:
        monkeypatch.setattr(module, "measure_in_turns", measure)
    monkeypatch.setattr(scaling, "time_collectives", lambda count, size: {"counts": 0.0, "gradients": 0.1})
    monkeypatch.setitem(CONFIGS, "small", CONFIGS["tiny"])


def facts_of(command: str, options: str, folder: Path) -> list[dict[str, Any]]:
    path = folder / "new" / "found.json"
    done = CliRunner().invoke(runpy.run_path(str(JOB))["app"], [command, *options.split(), "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "ours / this" in done.output
    reports = json.loads(path.read_text())
    assert all(way["ratio"] > 0 for report in reports for way in report["ways"])
    return [report["facts"] for report in reports]


@pytest.mark.parametrize(
    ("command", "options", "agrees"),
    [
        (
            "large-set",
            "--share 0.002",
            lambda labels, check, plan, first: (
                labels["images and annotations are the same"] and plan["batches"] == 20 * first["training images"]
            ),
        ),
        (
            "train-step",
            "--preset light --model tiny --prompts 2 --repeats 1",
            lambda one: one["cosine of both gradients"] > 0.999,
        ),
        (
            "feature-cache",
            "--model tiny --images 2 --prompts 2 --epochs 2",
            lambda first, later: later["passes of the vision trunk"] == {"sam3lora": 0, "sam3lora, nothing kept": 2},
        ),
        (
            "prompts",
            "--model tiny --device cpu --prompts 2 --repeats 1",
            lambda one, again: one["detections, sam3lora"] == one["detections, transformers"] > 0,
        ),
        (
            "adapters",
            "--model tiny --requests 4 --repeats 1",
            lambda *cases: all(one["requests with equally many"] == "4 of 4" for one in cases),
        ),
        (
            "data",
            "--images 5 --repeats 1 --no-ray",
            lambda *sizes: all(one["same queries and targets"] for one in sizes),
        ),
        ("data-wait", "--steps 1 --repeats 1", lambda *models: all(one["the same losses"] for one in models)),
        (
            "evaluate",
            "--model tiny --images 1 --prompts 2 --repeats 1",
            lambda one: one["largest difference of scores"] < 1e-4,
        ),
        (
            "evaluate-large",
            "--images 6 --categories 4 --present 20",
            lambda one: float(one["largest difference"]) < 1e-12,
        ),
        (
            "postprocess",
            "--masks 5 --kept 2 --mask-side 16 --height 40 --width 50",
            lambda *cases: all(one["kept, sam3lora"] == one["kept, plain"] > 0 for one in cases),
        ),
        (
            "click-masks",
            "--megapixels 0.05 --objects 3 --clicks 2",
            lambda one: one["equal"] and 0.5 < one["mean IoU at the end"] < 1,
        ),
        (
            "scaling",
            "--model tiny --prompts 1 --steps 1 --repeats 1",
            lambda one: (
                one["2 workers hold the same weights"] and not one["2 processes on their own hold the same weights"]
            ),
        ),
        ("cost-model", "--model tiny --repeats 1", lambda one: one["predicted / measured, 1 x 2"] > 0),
    ],
)
def test_command_finds_the_same_both_ways(command, options, agrees, in_this_process, tmp_path):
    assert agrees(*facts_of(command, options, tmp_path))


def test_serving_asks_both_servers_the_same(tmp_path):
    path = tmp_path / "found.json"
    options = ["--clients", "1", "4", "--adapters", "1", "4", "--seconds", "2", "--no-repeated", "--json", str(path)]
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    done = run_job("serve", *options, environment=settings)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(path.read_text())
    tables = {table["title"].partition(",")[0]: table["rows"] for table in found["tables"]}
    assert [(row["clients"], row["adapters"]) for row in tables["Closed loop"]] == [(1, 1), (1, 4), (4, 1), (4, 4)]
    for row in tables["Closed loop"] + tables["Images"]:
        assert row["plain errors"] == row["ours errors"] == 0
    assert found["facts"]["questions with equally many"] == "4 of 4"
    assert found["facts"]["IoU of the best mask, median"] > 0.9


# ---- as a program ----------------------------------------------------------------------------------------------------


def run_job(*arguments: str, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (environment or {})
    return subprocess.run(
        [sys.executable, str(JOB), *arguments], capture_output=True, text=True, env=variables, timeout=900, **options
    )


def test_job_measures_in_processes_of_its_own(tmp_path):
    # Started from another folder, without a path to the repository.
    options = [
        "--masks",
        "5",
        "--kept",
        "2",
        "--mask-side",
        "16",
        "--height",
        "40",
        "--width",
        "50",
        "--json",
        "found.json",
    ]
    done = run_job("postprocess", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "found.json").read_text())
    assert all(way["extra_mib"] >= 0 for report in reports for way in report["ways"])


@pytest.mark.parametrize("wrong", ["prompts --model huge", "adapters --requests 3", "postprocess --kept 0"])
def test_mistake_is_one_message(wrong):
    done = run_job(*wrong.split())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# ---- arithmetic of the reports ---------------------------------------------------------------------------------------


def test_ratio_and_table():
    comparison = BenchReport("work", [Timing("ours", 1.0, 20.0), Timing("plain", 4.0)], {"kept": 3})
    assert [way["ratio"] for way in comparison.to_dict()["ways"]] == [1.0, 0.25]
    console = Console(width=100, file=io.StringIO())
    comparison.print(console)
    assert all(words in console.file.getvalue() for words in ("ours", "20", "plain", "4.000", "0.250", "kept: 3"))


def test_ways_take_turns_and_the_median_counts(monkeypatch):
    clock, calls = [0.0], []
    lasting = iter([5, 1, 9, 2])  # the first round warms up

    def first():
        calls.append("first")
        clock[0] += next(lasting)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert time_in_turns({"first": first, "second": lambda: calls.append("second")}, repeats=3)["first"] == 2
    assert calls == ["first", "second"] * 4


def test_predicted_share_of_many_workers(monkeypatch):
    # 2 s a step together, 1.8 s apart, 1 s alone; 0.2 s of collective calls.
    seconds = {TOGETHER: 4.0, APART: 3.6, ALONE: 2.0}

    def measured(ways, **_):
        results = [{"gradient_bytes": 2e6, "weights": 1.0}]
        return {name: Measured((seconds[name],), None, None, (results,)) for name in ways}

    monkeypatch.setattr(scaling, "measure_in_turns", measured)
    monkeypatch.setattr(scaling, "time_collectives", lambda count, size: {"counts": 0.0, "gradients": 0.2})
    facts = compare_scaling(ScalingWork("light", "tiny", num_steps=2), rounds=1, simulated=(16,)).facts
    assert facts["images/s, 2 workers"] == 1.0
    assert facts["2 workers / 2 processes on their own"] == 0.9
    assert facts["predicted: 16 workers / as many processes on their own"] == 0.9


def test_cost_model_finds_what_the_steps_were_made_of():
    cost = StepCost(fixed=0.5, vision=2.0, detector=0.25)
    found = StepCost.fit({setting: cost(setting) for setting in FITTED})
    assert found(Setting(2, 4)) == pytest.approx(0.5 + 2 * (2.0 + 4 * 0.25))


def test_latencies_are_those_of_one_status():
    found = LoadResult(
        [LoadSample(0.1, 200), LoadSample(0.3, 200), LoadSample(0.001, 503), LoadSample(5.0, NO_ANSWER)], seconds=2.0
    )
    assert (found.per_second, found.num_errors, found.num_of(503)) == (1.0, 2, 1)
    assert found.latency_ms(50) == pytest.approx(200)
    assert found.latency_ms(50, 429) is None


def test_serving_tables_are_printed_and_kept():
    rows = [{"clients": 1, "p50 ms": 12.345, "p99 ms": None}, {"clients": 8, "p50 ms": 1234.5, "p99 ms": 0.0}]
    report = ServingReport("Serving", [Rows("Closed loop", rows, "read so")], {"kept": 3})
    console = Console(width=100, file=io.StringIO())
    report.print(console)
    assert all(words in console.file.getvalue() for words in ("Closed loop", "12.3", "1234", "read so", "kept: 3"))
    assert report.to_dict()["tables"][0]["rows"] == rows


def test_tensor_memory_is_that_of_living_tensors():
    import torch

    with TensorMemory() as memory:
        first = torch.zeros(10)
        second = first * 2
        view = second[:5]
        del first
        third = torch.zeros(10)
    assert memory.peak_bytes == memory.live_bytes == 80
    del second, view, third
    assert memory.live_bytes == 0


def test_collective_calls_are_timed_among_processes():
    assert all(seconds > 0 for seconds in time_collectives(2, 4000, repeats=1).values())
