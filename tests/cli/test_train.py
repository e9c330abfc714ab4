"""`sam3lora train` hands a checked configuration to the trainer, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sam3lora
from sam3lora.cli import main

REPOSITORY = Path(sam3lora.__file__).parents[1]


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the trainer and records what it is given."""
    seen = []
    launch = types.ModuleType("sam3lora.training.launch")
    launch.train = lambda config, *, resume=False: seen.append((config, resume))
    monkeypatch.setitem(sys.modules, "sam3lora.training.launch", launch)
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_options_reach_the_configuration(calls, tmp_path):
    # Also: underscores in options, and a path that YAML would take apart.
    folder = tmp_path / "a: b #1 'c'"
    folder.mkdir()
    words = ["train", "light", "lora.rank=4", "--data_dir", str(folder), "--output-dir", "out: 1"]
    assert main([*words, "--num-workers", "0", "--resume"]) == 0
    [(config, resume)] = calls
    assert resume is True
    assert config.lora.rank == 4
    assert config.training.data_dir == str(folder)
    assert config.output.output_dir == "out: 1"
    assert config.scaling.num_workers == 0


def test_options_win_over_overrides(calls, tmp_path):
    main(["train", "light", "training.data_dir=elsewhere", "--data-dir", str(tmp_path)])
    assert calls[0][0].training.data_dir == str(tmp_path)


def test_device_chooses_gpus_and_workers(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert main(["train", "light", "--data-dir", str(tmp_path), "--device", "0", "2", "lora.rank=4"]) == 0
    config, _ = calls[0]
    assert config.scaling.num_workers == 2
    assert config.scaling.use_gpu is True
    assert config.lora.rank == 4
    # Numbers count among the GPUs that a scheduler has given to this process.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_device_cpu_uses_no_gpu(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    main(["train", "light", "--data-dir", str(tmp_path), "--device", "cpu"])
    assert calls[0][0].scaling.use_gpu is False


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--device", "0", "0"], "twice"),
        (["--device=gpu"], "GPU numbers"),
        (["--device", "0", "1", "--num-workers", "3"], "--num-workers 3"),
        (["--device", "0", "--address", "10.0.0.1:6379"], "--num-workers instead"),
        (["--device", "7"], "may see 1 GPUs"),
    ],
)
def test_device_mistakes(words, part, calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert main(["train", "light", "--data-dir", str(tmp_path), *words]) == 2
    assert part in capsys.readouterr().err
    assert not calls


def test_job_runs_the_source_that_was_submitted_with_it(tmp_path):
    # A job's working directory holds source that may be newer than what the cluster has installed.
    for folder in ("jobs", "sam3lora"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPOSITORY / "jobs" / "train.py", tmp_path / "jobs")
    (tmp_path / "sam3lora" / "__init__.py").touch()
    (tmp_path / "sam3lora" / "cli.py").write_text("def main(words):\n    print('submitted', *words)\n    return 0\n")
    command = [sys.executable, str(tmp_path / "jobs" / "train.py"), "light", "lora.rank=4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "submitted train light lora.rank=4\n", done.stderr
