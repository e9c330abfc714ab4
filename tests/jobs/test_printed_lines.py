"""The lines that submit jobs work as the pages print them, whether or not Ray has written a token before."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..test_docs import ROOT, shown_lines

TOKEN = "ab" * 32
SMALL = (
    "model.name=tiny scaling.num_workers=1 scaling.use_gpu=false training.max_steps=1 training.num_workers=1 "
    "training.gradient_checkpointing=false data.augmentation=none evaluation.every_epochs=0"
)


def printed(page: str, first_words: str) -> str:
    (line,) = [line for line in shown_lines((ROOT / page).read_text()) if line.startswith(first_words)]
    return line


TOKEN_LINE = printed("README.md", "export RAY_AUTH_MODE")
JOB = "ray job submit --working-dir . -- python jobs"
TRAIN, VALIDATE = (printed("README.md", f"{JOB}/{name}.py") for name in ("train", "validate"))
PREDICT = printed("docs/batch_inference.md", f"{JOB}/predict.py")


def test_pages_agree_on_the_line_of_the_token():
    assert printed("docs/cluster.md", "export RAY_AUTH_MODE") == TOKEN_LINE


@pytest.fixture(scope="module")
def free_ports() -> list[int]:
    """Below those of Ray's workers."""
    sockets = [socket.socket() for _ in range(7)]
    for number, one in enumerate(sockets):
        for port in range(6500 + 500 * number, 7000 + 500 * number):
            try:
                one.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(params=[False, True], ids=["no_token_yet", "after_a_token"])
def has_token(request) -> bool:
    return request.param


@pytest.fixture
def cluster(has_token, free_ports, tmp_path, monkeypatch) -> Iterator[Path]:
    """A head as `ray start --head` makes it, before or after Ray has written a token; yields a copy of the checkout."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for name in ("sam3lora", "jobs", "tune_spaces"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    if has_token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(TOKEN)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    gcs, dashboard, agent, agent_grpc, environments, metrics, client = free_ports
    words = (
        f"ray start --head --block --num-cpus=3 --object-store-memory=200000000 --temp-dir=/tmp/rt{os.getpid()} "
        f"--port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
        f"--dashboard-agent-grpc-port={agent_grpc} --runtime-env-agent-port={environments} "
        f"--metrics-export-port={metrics} --ray-client-server-port={client}"
    ).split()
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(words, stdout=log, stderr=log, cwd=tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{dashboard}")
    try:
        yield checkout
    finally:
        head.terminate()
        head.wait(60)
        log.close()
        shutil.rmtree(f"/tmp/rt{os.getpid()}", ignore_errors=True)


def paste(line: str, folder: Path, shared: Path) -> subprocess.CompletedProcess[str]:
    """Run the line of the token and one more in a shell; a cluster that has just started takes no jobs yet."""
    script = f"{TOKEN_LINE}\n{line}".replace("/shared", str(shared))
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=400)
        said = done.stdout + done.stderr
        starting = "No available agent" in said or "Failed to connect to Ray" in said
        if not starting or time.monotonic() > deadline:
            return done


@pytest.mark.slow
def test_jobs_work_as_printed(cluster, has_token, tmp_path):
    shared = tmp_path / "shared"
    synth = ["data", "synth", str(shared / "data"), "--num-train", "4", "--num-valid", "2", "--size", "64"]
    subprocess.run([sys.executable, "-m", "sam3lora", *synth], cwd=cluster, check=True, capture_output=True)
    if has_token:
        lines, result = [PREDICT], shared / "labels" / "predictions.json"
        shutil.copytree(ROOT / "serve_app" / "samples" / "parts-light", shared / "run" / "best")
        (shared / "images").symlink_to(shared / "data" / "valid")
    else:
        lines, result = [f"{TRAIN} {SMALL}", VALIDATE], shared / "validation" / "metrics.json"
    for line in lines:
        done = paste(line, cluster, shared)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        assert "succeeded" in said
        assert "Traceback" not in said
    assert result.is_file()
