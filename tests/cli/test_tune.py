"""`sam3lora tune` hands a checked search space to the sweep or to its explanation."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import yaml

from sam3lora.cli import main
from sam3lora.errors import RunFailed, UserError
from sam3lora.tune.run.ledger import TrialRecord


@pytest.fixture
def space_file(tmp_path) -> Path:
    """Ranks around `quick_test`."""
    file = tmp_path / "ranks.yaml"
    file.write_text(yaml.safe_dump({"base": "quick_test", "parameters": {"lora.rank": {"choice": [4, 8, 16]}}}))
    return file


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "a: b #1"
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
    return folder


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for the sweep and records what it is given."""
    seen = []
    package = types.ModuleType("sam3lora.tune.run.sweep")

    def run_sweep(space, output_dir, **options):
        seen.append((space, output_dir, options))
        best = TrialRecord(number=3, values={}, status="finished", value=0.5)
        base = TrialRecord(number=0, values={}, status="finished", value=0.25, is_base=True)
        folder = tmp_path / "my sweep"
        return types.SimpleNamespace(
            sweep_dir=folder, best=best, base=base, report=folder / "sweep.html", records=[], summary={"held_out": None}
        )

    package.run_sweep = run_sweep
    monkeypatch.setitem(sys.modules, "sam3lora.tune.run.sweep", package)
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return seen


def test_options_reach_the_sweep(calls, space_file, data, tmp_path, capsys):
    words = ["tune", str(space_file), "training.num_epochs=3", "--data_dir", str(data), "--output-dir", "out: 1"]
    search = ["--algorithm", "grid", "--metric", "cgf1", "--max-concurrent", "2", "--num_samples", "2"]
    assert main([*words, *search, "--num-workers", "0", "--resume", "--retry-failed", "--address", "auto"]) == 0
    [(space, output_dir, options)] = calls
    assert output_dir == Path("out: 1")
    assert options == {"resume": True, "retry_failed": True, "address": "auto"}
    assert space.base.training.num_epochs == 3
    assert space.base.training.data_dir == str(data)
    assert space.base.scaling.num_workers == 0
    assert space.base.scaling.address == "auto"
    assert (space.search.algorithm, space.search.metric, space.search.max_concurrent) == ("grid", "cgf1", 2)
    assert space.num_trials == 2
    printed = capsys.readouterr().out
    assert "best: trial 3 with cgf1 0.5, the base configuration 0.25" in printed
    assert "sam3lora train 'my sweep'/best/config.yaml" in printed
    assert "held out  This value is optimistic" in printed
    assert os.path.join("my sweep", "sweep.html") in printed


def test_shipped_space_with_another_base(calls, data):
    assert main(["tune", "lora_quick", "--config", "quick_test", "--data-dir", str(data), "--num-trials", "3"]) == 0
    [(space, output_dir, options)] = calls
    assert space.base.model.name == "tiny"
    assert space.num_trials == 3
    assert output_dir == Path("outputs/lora_quick")
    assert options == {"resume": False, "retry_failed": False, "address": None}


def test_gpus_are_shared_by_the_trials(calls, space_file, data, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    words = ["tune", str(space_file), "--data-dir", str(data), "--device", "0", "2"]
    assert main(words) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert main([*words, "--num-workers", "2"]) == 0
    assert main([*words, "--num-workers", "3"]) == 2  # more than --device names
    (first, *_), (second, *_) = calls
    assert first.base.scaling.use_gpu is True
    assert first.base.scaling.num_workers == 1  # as the configuration has it
    assert second.base.scaling.num_workers == 2


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("say so"), 2), (RunFailed("say so"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_status(error, status, calls, space_file, data, monkeypatch, capsys):
    def run_sweep(*args, **options):
        raise error

    monkeypatch.setattr(sys.modules["sam3lora.tune.run.sweep"], "run_sweep", run_sweep)
    assert main(["tune", str(space_file), "--data-dir", str(data)]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_explain_trains_nothing_and_writes_nothing(space_file, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["tune", str(space_file), "--explain", "--no-probe", "lora.alpha=4"]) == 0
    printed = capsys.readouterr().out
    assert "Sweep       ranks: 3 trials" in printed
    assert "0 base" in printed
    assert "\x1b" not in printed  # plain text for a file or a pipe
    assert sorted(tmp_path.rglob("*")) == before
