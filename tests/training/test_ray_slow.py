"""Faults, clusters and jobs: training where Ray itself is what is tried out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sam3lora.errors import RunFailed
from sam3lora.training.launch import train

from .ray_runs import ENVIRONMENT, SMALL_STEPS, local_ray, once_at_step, processes_named, worker_processes
from .run_folder import adapter_of, assert_equal, lines_of

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def ray_environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_run_goes_on_after_a_worker_is_killed_as_if_nothing_had_happened(make_config):
    def config(name: str):
        return make_config(
            "scaling.num_workers=2", "scaling.max_failures=1", *SMALL_STEPS, num_epochs=8, save_steps=4, output=name
        )

    with local_ray(num_cpus=4):
        straight = train(config("straight"))
        disturbed = config("disturbed")
        output_dir = Path(disturbed.output.output_dir)

        def kill() -> None:
            # What writers that were killed could have left must not be taken for a checkpoint.
            for name in (f".{'0123' * 8}.part", "step_00000099"):
                (output_dir / "checkpoints" / name).mkdir()
                (output_dir / "checkpoints" / name / "adapter.safetensors").write_bytes(b"half")
            worker_processes()[0].kill()

        with once_at_step(output_dir, 6, kill) as killed:
            result = train(disturbed)

    assert killed.is_set()
    first, second = lines_of(output_dir, "start")
    assert first["step"] == 0
    # From a checkpoint, most of which lie within an epoch: it has three steps.
    assert second["step"] in range(4, 24, 4)
    assert [line["step"] for line in lines_of(output_dir, "step")] == list(range(1, 25))
    assert result.steps == straight.steps == 24
    same = ("step", "epoch", "train_loss", "valid_loss", "train_terms", "valid_terms", "lr")
    assert [[line[key] for key in same] for line in result.history] == [
        [line[key] for key in same] for line in straight.history
    ]
    assert result.best_loss == straight.best_loss
    for name in ("best", "last"):
        assert_equal(adapter_of(result, name), adapter_of(straight, name))
    assert not list((output_dir / "checkpoints").glob(".*"))


def test_worker_lost_too_often_is_said_in_one_message_and_can_be_resumed(make_config):
    # Restarts are limited: a run that always dies ends. What was saved stays.
    def config():
        return make_config("scaling.num_workers=1", "scaling.max_failures=0", *SMALL_STEPS, num_epochs=3, save_steps=2)

    output_dir = Path(config().output.output_dir)
    with local_ray(num_cpus=2):
        with (
            once_at_step(output_dir, 4, lambda: worker_processes()[0].kill()),
            pytest.raises(RunFailed, match=r"worker 0 was lost and scaling\.max_failures=0 .*--resume"),
        ):
            train(config())
        result = train(config(), resume=True)
    assert result.steps == 18
    assert [line["step"] for line in lines_of(output_dir, "step")] == list(range(1, 19))


def test_lost_controller_is_said_in_one_message_and_the_run_can_be_resumed(make_config):
    def config():
        return make_config("scaling.num_workers=1", *SMALL_STEPS, num_epochs=3, save_steps=2)

    output_dir = Path(config().output.output_dir)
    with local_ray(num_cpus=2):
        kill = lambda: processes_named("TrainController")[0].kill()  # noqa: E731
        with once_at_step(output_dir, 4, kill), pytest.raises(RunFailed, match=r"controller.* was lost: .*--resume"):
            train(config())
    # Another Ray, as this one has no dashboard, by which Ray Train would free what a lost controller had reserved.
    with local_ray(num_cpus=2):
        result = train(config(), resume=True)
    assert result.steps == 18
    assert [line["step"] for line in lines_of(output_dir, "step")] == list(range(1, 19))


@pytest.mark.parametrize(
    ("num_cpus", "share", "num_workers"),
    # A worker takes two CPUs. Where none is left beside the workers, data tasks that asked for one would wait forever.
    [(3, (), 1), (2, ("scaling.resources_per_worker={CPU: 1}",), 2)],
)
def test_elastic_run_starts_with_the_workers_there_is_room_for(num_cpus, share, num_workers, make_config):
    with local_ray(num_cpus=num_cpus):
        result = train(make_config("scaling.num_workers=[1, 2]", *share, *SMALL_STEPS, num_epochs=1))
    assert [start["num_workers"] for start in lines_of(result, "start")] == [num_workers]
    assert result.steps == 6 // num_workers


def test_interrupted_run_ends_and_gives_the_signal_back(make_config):
    # Ray Train's own handler ends the process with status 0, and stays in place after the run.
    config = make_config("scaling.num_workers=1", *SMALL_STEPS, num_epochs=50)
    before = signal.getsignal(signal.SIGINT)
    with local_ray(num_cpus=2):
        interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        with once_at_step(Path(config.output.output_dir), 2, interrupt), pytest.raises(KeyboardInterrupt):
            train(config)
        assert signal.getsignal(signal.SIGINT) is before
        gone = time.monotonic() + 30
        while worker_processes() and time.monotonic() < gone:
            time.sleep(0.1)
        assert not worker_processes()


def test_workers_on_two_nodes(make_config):
    # Neither node has room for both, and the run joins a cluster that it did not start.
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": int(2e8), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=int(2e8))
        spread = ("scaling.num_workers=2", "scaling.placement_strategy=STRICT_SPREAD")
        address = f"scaling.address='{cluster.address}'"
        result = train(make_config(*spread, address, *SMALL_STEPS, num_epochs=1))
        import ray

        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    assert [start["num_workers"] for start in lines_of(result.output_dir, "start")] == [2]
    assert result.steps == 3


@pytest.fixture
def cluster_with_jobs():
    """The address of the dashboard of a cluster that runs as its own process."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets have short names
    ports = free_ports(4)
    command = f"start --head --block --port={ports[0]} --dashboard-port={ports[1]} --ray-client-server-port={ports[2]}"
    # By default the agents of all Rays of a machine want the same port, and the one without it starts no jobs.
    agent = f"--dashboard-agent-listen-port={ports[3]}"
    options = f"{agent} --dashboard-host=127.0.0.1 --num-cpus=3 --object-store-memory=200000000 --temp-dir={folder}"
    log = Path(folder) / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command.split(), *options.split()],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )
    try:
        wait_for_port(ports[1], head, log)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Below the ports that Ray gives to its workers."""
    found = []
    for port in range(7000, 9000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def submit(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["job", "submit", "--address", address, "--working-dir", ".", "--", "python", "jobs/train.py", *words]
    ray = str(Path(sys.executable).with_name("ray"))
    for _ in range(20):
        done = subprocess.run([ray, *command], capture_output=True, text=True, cwd=REPOSITORY, timeout=400)
        if "No available agent" not in done.stderr:  # the dashboard answers before the one that starts jobs
            break
    return done


def test_submitted_job_trains_and_its_mistakes_come_back(cluster_with_jobs, lively_base, scenes, tmp_path):
    options = ["quick_test", f"model.name={lively_base}", "--data-dir", str(scenes)]
    # A job's working directory is a copy that goes away: a relative folder would take the results with it.
    lost = submit(cluster_with_jobs, *options, "--output-dir", "outputs/run")
    assert lost.returncode != 0
    assert "give --output-dir an absolute path" in lost.stdout + lost.stderr
    assert re.search(r"exit code 2\b", lost.stdout + lost.stderr)

    run = tmp_path / "run"
    done = submit(cluster_with_jobs, *options, "--output-dir", str(run), "training.max_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert (run / "last" / "adapter_model.safetensors").is_file()
    assert not list(run.glob(".*.part"))
