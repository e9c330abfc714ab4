"""serve_app/config.yaml on a cluster that asks for a token: `serve run`, and a change with `serve deploy`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

import serve_app

from .checked_load import send_all
from .large_messages import LIMITS, check_large_messages
from .ray_service import QUIET_ENVIRONMENT, STOP_S, get, wait_until
from .small_service import SmallService

pytestmark = pytest.mark.slow
REPOSITORY = Path(serve_app.__file__).parents[1]
PROGRAMS = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Outside the range that `ray start` gives to workers."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(log: Path, environment: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, which is interrupted at the end; nothing of it is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PROGRAMS / command[0], *command[1:]],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs([psutil.Process(process.pid), *family] if family else [], timeout=STOP_S)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path that leaves room for the names of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_the_shipped_file_serves_and_its_user_config_changes_in_place(tmp_path: Path, short: Path) -> None:
    small = SmallService(tmp_path)
    http, gcs, dashboard, agent = free_ports(4)
    environment = {**os.environ, **QUIET_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= {"RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    environment["RAY_TMPDIR"] = str(short)

    file = tmp_path / "config.yaml"
    config = yaml.safe_load((REPOSITORY / "serve_app" / "config.yaml").read_text())
    config["http_options"]["port"] = http
    [application] = config["applications"]
    application["args"] |= {"model": str(small.base), "num_gpus": 0, "num_cpus": 0.5, "torch_threads": 1}
    application["args"]["limits"] |= LIMITS
    application["args"]["batching"] |= {"max_rows": 64}
    [segmenter] = application["deployments"]
    segmenter["user_config"]["root"] = str(small.root)
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{http}"

    head = ["ray", "start", "--head", "--block", "--num-cpus=3", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    head += ["--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=150000000"]
    with running(tmp_path / "head.log", {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}, *head) as ray:
        wait_until(lambda: get(f"http://127.0.0.1:{dashboard}/api/version")[0] == 401)  # no token
        with running(tmp_path / "run.log", environment, "serve", "run", str(file)) as run:
            wait_until(lambda: run.poll() is not None or get(f"{url}/readyz")[0] == 200)
            assert set(send_all(url, small.cases()).kinds()) == {"ok"}, (tmp_path / "run.log").read_text()
            check_large_messages(url)
            before = _replicas(ray)
            assert len(before) == 2
            segmenter["user_config"]["allowed"] = ["heads"]
            file.write_text(yaml.safe_dump(config))
            subprocess.run([PROGRAMS / "serve", "deploy", str(file)], env=environment, cwd=REPOSITORY, check=True)
            wait_until(lambda: _served(url) == ["heads"])
            assert set(send_all(url, small.cases(["heads"])).kinds()) == {"ok"}
            assert _replicas(ray) == before


def _served(url: str) -> list[str]:
    return [one["id"] for one in json.loads(get(f"{url}/v1/adapters")[1])["adapters"]]


def _replicas(ray: subprocess.Popen[bytes]) -> set[int]:
    found = psutil.Process(ray.pid).children(recursive=True)
    return {one.pid for one in found if any("ServeReplica:sam3lora" in word for word in one.cmdline())}
