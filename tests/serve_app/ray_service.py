"""The application on a Ray of its own, in a process of its own: `start_service`; `python FILE PORT` is that process.

It obeys JSON commands on its standard input, one a line, and ends when that is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

APPLICATION = "sam3lora"
START_S = 240.0
STOP_S = 90.0
QUIET_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayService:
    """A running service, as its operator sees it.

    Args:
        process: The driver, which started Ray.
        port: Of HTTP on 127.0.0.1.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, settings: dict[str, Any], *, wait: bool = True) -> None:
        """As `sam3lora serve` does it; the application that runs is replaced."""
        self._tell("deploy", settings=settings)
        if wait:
            self.wait_running()

    def configure(self, settings: dict[str, Any], segmenter: dict[str, Any], *, wait: bool = True) -> None:
        """As `serve deploy` does it with `segmenter` in its file under `deployments`."""
        self._tell("configure", settings=settings, segmenter=segmenter)
        if wait:
            self.wait_running()

    def status(self) -> dict[str, Any]:
        """`status` of the application, its `message`, and `replicas` of each deployment by state."""
        return self._tell("status")

    def pids(self, deployment: str = "Segmenter") -> list[int]:
        """Processes of a deployment's replicas that are alive."""
        return sorted(process.pid for process in self._replicas(deployment))

    def rss_mb(self, deployment: str) -> float:
        """Resident memory of a deployment's replicas together."""
        return sum(process.memory_info().rss for process in self._replicas(deployment)) / 2**20

    def wait_running(self, **replicas: int) -> None:
        """Until the application runs, is ready, and has so many replicas of each deployment and no others."""

        def is_running() -> bool:
            status = self.status()
            assert status["status"] != "DEPLOY_FAILED", status
            right = all(status["replicas"][name] == {"RUNNING": number} for name, number in replicas.items())
            return status["status"] == "RUNNING" and right and get(f"{self.url}/readyz")[0] == 200

        wait_until(is_running)

    def _replicas(self, deployment: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{APPLICATION}:{deployment}" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _tell(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the driver ended"}')
        assert "error" not in answer, answer
        return answer


@contextlib.contextmanager
def start_service(port: int, **environment: str) -> Iterator[RayService]:
    """A Ray with Serve on it and no application yet; all its processes are gone after the block."""
    command = [sys.executable, "-m", "tests.serve_app.ray_service", str(port)]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **QUIET_ENVIRONMENT, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        service = RayService(process, port)
        service.status()
        yield service
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        _, left = psutil.wait_procs(ours, timeout=10)
        for one in [*left, *([process] if process.poll() is None else [])]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()


def wait_until(condition: Callable[[], Any], timeout_s: float = START_S) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: It did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {condition}")
        time.sleep(0.05)


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and body; 0 where nobody answers."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return 0, ""


def _deploy(settings: dict[str, Any]) -> None:
    from ray import serve

    from serve_app.builder import build
    from serve_app.settings import ServeSettings

    target = serve.RunTarget(build(ServeSettings(**settings)), name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _configure(settings: dict[str, Any], segmenter: dict[str, Any]) -> None:
    """What the REST server behind `serve deploy` does, without the dashboard."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "serve_app.builder:build",
        "args": settings,
        "deployments": [{"name": "Segmenter", **segmenter}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))  # type: ignore[list-item]


def _status() -> dict[str, Any]:
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return {"status": "NONE", "message": "", "replicas": {}}
    deployments = found.deployments.items()
    replicas = {name: {str(state): n for state, n in one.replica_states.items() if n} for name, one in deployments}
    messages = [found.message, *(one.message for _, one in deployments)]
    return {"status": found.status, "message": " ".join(messages), "replicas": replicas}


def _obey(port: int) -> None:
    from serve_app.settings import prepare_environment

    prepare_environment()
    import ray
    from ray import serve

    ray.init(num_cpus=12, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    commands: dict[str, Callable[..., dict[str, Any] | None]]
    commands = {"deploy": _deploy, "configure": _configure, "status": _status}
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # Ray prints to it
        for line in sys.stdin:
            arguments = json.loads(line)
            try:
                answer = commands[arguments.pop("command")](**arguments) or {}
            except Exception as error:
                answer = {"error": repr(error)}
            print(json.dumps(answer), file=answers, flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    _obey(int(sys.argv[1]))
