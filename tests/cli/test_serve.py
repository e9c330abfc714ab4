"""`sam3lora serve`: its options, and the process from start to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import serve_app
from sam3lora.cli import main
from sam3lora.cli import serve as serve_verb
from sam3lora.client import Client, SegmentationError
from serve_app.settings import AdapterSettings, ServeSettings

from ..serve_app.checked_load import Case, running_load, send_all
from ..serve_app.large_messages import LIMITS, check_large_messages
from ..serve_app.ray_service import QUIET_ENVIRONMENT, STOP_S, get, wait_until
from ..serve_app.small_service import IMAGES, PROMPTS, SmallService, fields

PORT = 18830


# --- options ---


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the server; keeps what it would have been started with."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serve_verb, "_run", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("SAM3LORA_API_KEYS", None)
    return seen


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (None, ["--adapters", "nowhere"], "--adapters nowhere is no folder"),
        (None, ["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml: No such file"),
        ("[1, 2]", [], "must hold settings as `key: value`, got list"),
        ("replicas: [", [], "cannot read --config"),
        ("replica: 2", [], "replica: Extra inputs are not permitted"),
        ("replicas: 0", [], "replicas: Input should be greater than 0"),
        ("limits: {timeout_s: soon}", [], "limits.timeout_s"),
        ("autoscaling: {min_replicas: 3, max_replicas: 2}", [], "min_replicas 3 is above max_replicas 2"),
        ("replicas: two", [], "replicas: Input should be a valid integer"),
        ("cors_origins: [example.org]", [], "expected sites such as https://example.org"),
        ("cors_origins: ['https://example.org/']", [], "without a path"),
        ("applications: []", [], "holds no application"),
        ("applications: [{name: other}, 3]\nx: 1", ["--replicas", "0"], "--replicas"),
        (None, ["--port", "0"], "--port"),
        (None, ["--num-gpus", "-1"], "--num-gpus"),
        (None, ["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_a_mistake_in_the_options_is_told_once(text, words, message, started, tmp_path, capfd):
    if text is not None:
        (tmp_path / "serve.yaml").write_text(text)
        words = [*words, "--config", str(tmp_path / "serve.yaml")]
    assert main(["serve", "--port", str(PORT), *words]) == 2
    error = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error
    assert not started


def test_a_variable_without_a_key_is_told_before_anything_starts(started, capfd):
    os.environ["SAM3LORA_API_KEYS"] = " ,"
    assert main(["serve", "--port", str(PORT)]) == 2
    assert "SAM3LORA_API_KEYS holds no key" in capfd.readouterr().err
    assert not started


def test_a_port_in_use_is_told_before_anything_starts(started, capfd):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port" in capfd.readouterr().err
    assert not started


def test_options_win_over_the_file(started, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("replicas: 2\nresolution: 112\nadapters: {root: elsewhere, allowed: [a]}")
    words = ["--config", str(file), "--adapters", str(tmp_path), "--replicas", "3", "--num-gpus", "0"]
    assert main(["serve", "--port", str(PORT), *words]) == 0
    settings, host, port, address, _ = started[0]
    assert (host, port, address) == ("127.0.0.1", PORT, None)
    assert (settings.replicas, settings.resolution, settings.num_gpus, settings.model) == (3, 112, 0, "tiny")
    assert (settings.adapters.root, settings.adapters.allowed) == (tmp_path, ("a",))


@pytest.mark.parametrize(
    ("words", "variables", "listens_itself"),
    [
        ([], {}, True),
        (["--address", "local"], {}, True),
        (["--haproxy"], {}, False),
        (["--config", "two.yaml"], {}, False),  # several need one in front
        (["--address", "10.0.0.1:6379"], {}, False),  # Ray Serve, or its port, may have another owner there
        ([], {"RAY_ADDRESS": "10.0.0.1:6379"}, False),
        ([], {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}, False),
    ],
)
def test_the_only_http_process_of_a_local_ray_listens_itself(
    words, variables, listens_itself, started, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("ingress_replicas: 2")
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(variables)
    assert main(["serve", "--port", str(PORT), *words]) == 0
    assert started[0][-1] is listens_itself
    ports = [os.environ.get(f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT") for end in ("MIN", "MAX")]
    assert ports == ([str(PORT), str(PORT + 1)] if listens_itself else [None, None])


def test_a_file_for_serve_run_is_taken_too(started):
    file = Path(serve_app.__file__).parent / "config.yaml"
    assert main(["serve", "--port", str(PORT), "--config", str(file)]) == 0
    assert started[0][0].limits.max_queued == 64
    assert started[0][0].adapters.root == Path("serve_app/samples")


def test_without_options_it_has_something_to_show(started):
    assert main(["serve", "--port", str(PORT)]) == 0
    root = started[0][0].adapters.root
    assert (root / "parts" / "adapter_config.json").is_file()


def test_a_folder_that_cannot_be_asked_for_is_told_at_the_start(tmp_path, capsys):
    for name in ("good", "my adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    serve_verb._print_addresses(ServeSettings(adapters=AdapterSettings(root=tmp_path)), "127.0.0.1", PORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny with good"
    assert lines[1].startswith("not served: 'my adapter': rename the folder")


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", "", True), ("0.0.0.0", "secret", False), ("127.0.0.1", "", False)]
)
def test_an_open_door_is_warned_of(host, key, warns, started, monkeypatch, capfd):
    monkeypatch.setitem(os.environ, "SAM3LORA_API_KEYS", key)
    assert main(["serve", "--host", host, "--port", str(PORT)]) == 0
    error = capfd.readouterr().err
    assert ("without an API key" in error) == warns
    assert "secret" not in error


@pytest.mark.parametrize(
    ("host", "key", "text", "names"),
    [
        ("127.0.0.1", "", "{}", ("127.0.0.1", "localhost", "::1")),
        ("127.0.0.1", "secret", "{}", None),
        ("0.0.0.0", "", "{}", None),
        ("127.0.0.1", "", "allowed_hosts: [lab.example]", ("lab.example",)),
    ],
)
def test_a_local_service_without_keys_answers_to_local_names(host, key, text, names, started, monkeypatch, tmp_path):
    (tmp_path / "service.yaml").write_text(text)
    monkeypatch.setitem(os.environ, "SAM3LORA_API_KEYS", key)
    assert main(["serve", "--host", host, "--port", str(PORT), "--config", str(tmp_path / "service.yaml")]) == 0
    assert started[0][0].allowed_hosts == names


# --- the process ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallService:
    return SmallService(tmp_path_factory.mktemp("service"))


class Served:
    """`sam3lora serve` in a process of its own."""

    def __init__(self, settings: dict[str, Any], port: int, folder: Path, *options: str, **environment: str) -> None:
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        words = ["serve", "--config", str(folder / "serve.yaml"), "--port", str(port), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sam3lora", *words],
                env={**os.environ, **QUIET_ENVIRONMENT, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or get(f"{self.url}/readyz")[0] == 200)
        assert self.process.poll() is None, self.log.read_text()

    def stop(self, number: signal.Signals) -> tuple[int, list[psutil.Process]]:
        """Exit status, and the processes that are left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        return self.process.wait(STOP_S), psutil.wait_procs(family, timeout=10)[1]


@contextlib.contextmanager
def serving(settings: dict[str, Any], port: int, folder: Path, *options: str, **environment: str) -> Iterator[Served]:
    served = Served(settings, port, folder, *options, **environment)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            _, left = served.stop(signal.SIGTERM)
            for process in left:
                process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_are_finished_at_the_end(number, small, tmp_path):
    with serving(small.settings(), PORT + 1, tmp_path) as served:
        served.wait_ready()
        with running_load(served.url, small.cases(), clients=6) as load:
            load.wait_ok(30)
            signalled = time.monotonic()
            status, left = served.stop(number)
    assert any(sample.began < signalled < sample.began + sample.seconds for sample in load.samples)
    assert {sample.kind for sample in load.samples if sample.began < signalled} == {"ok"}
    # Those that came too late were told so, until the port closed.
    assert set(load.kinds(since=signalled)) <= {"ok", "not_ready", "broken connection"}
    assert get(f"{served.url}/healthz")[0] == 0
    assert (status, left) == (0, [])
    said = served.log.read_text()
    assert "stopping" in said
    assert "INFO" not in said
    assert "raylet" not in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_while_it_starts_stops_it(small, tmp_path):
    with serving(small.settings(), PORT + 2, tmp_path) as served:
        wait_until(lambda: get(f"{served.url}/-/healthz")[0] == 200 or served.process.poll() is not None)
        status, left = served.stop(signal.SIGTERM)
    assert (status, left) == (0, []), served.log.read_text()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_told(small, tmp_path):
    (tmp_path / "empty").mkdir()
    with serving(small.settings(model=str(tmp_path / "empty")), PORT + 3, tmp_path) as served:
        assert served.process.wait(240) == 2
    said = served.log.read_text()
    assert "error:" in said
    assert str(tmp_path / "empty") in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_keys_and_metrics_over_http(small, tmp_path):
    settings = small.settings(replicas=2)
    with serving(settings, PORT + 4, tmp_path, "--host", "0.0.0.0", SAM3LORA_API_KEYS="first, second") as served:
        ready: list[int] = []
        wait_until(lambda: ready.append(get(f"{served.url}/readyz")[0]) or ready[-1] == 200)
        assert set(ready) <= {0, 503, 200}  # nobody, not yet, ready
        assert get(f"{served.url}/-/routes")[0] == 404
        # The service, and Ray Serve's own calls, which ask for Ray's token; not Ray's spare HTTP process.
        assert _open_to_others(served) == {"ServeReplica"}
        wait_until(lambda: _replicas(served, X_API_Key="first") == 2)
        assert get(f"{served.url}/healthz")[0] == 200
        for path in ("/v1/adapters", "/metrics"):
            for headers in ({}, {"X_API_Key": "third"}, {"Authorization": "Bearer first, second"}):
                status, body = get(served.url + path, **headers)
                assert (status, json.loads(body)["error"]["type"]) == (401, "unauthorized")
            for headers in ({"X_API_Key": "second"}, {"Authorization": "Bearer first"}):
                assert get(served.url + path, **headers)[0] == 200
        [sample] = send_all(served.url, [Case(IMAGES[0], fields(None))]).samples
        assert sample.kind == "unauthorized"
    assert "second" not in served.log.read_text()


@pytest.mark.slow
def test_large_images_and_answers(small, tmp_path):
    with serving(small.settings(limits=LIMITS, batching={"max_rows": 64}), PORT + 8, tmp_path) as served:
        served.wait_ready()
        check_large_messages(served.url)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["Segmenter", "Ingress", "ProxyActor"])
def test_a_killed_process_is_not_noticed_with_the_client(victim, small, tmp_path):
    failures: list[SegmentationError] = []
    answered = [0] * 4
    over = threading.Event()

    def ask(number: int) -> None:
        with Client(served.url) as client:
            while not over.is_set():
                try:
                    client.segment(IMAGES[number], PROMPTS)
                    answered[number] += 1
                except SegmentationError as error:
                    failures.append(error)

    with serving(small.settings(), PORT + 9, tmp_path) as served:
        served.wait_ready()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: min(answered) >= 3)
        [process] = [
            one
            for one in psutil.Process(served.process.pid).children(recursive=True)
            if victim in " ".join(one.cmdline())
        ]
        process.kill()
        process.wait()
        before = list(answered)
        wait_until(lambda: failures or all(now >= then + 3 for now, then in zip(answered, before, strict=True)))
        over.set()
        for thread in threads:
            thread.join()
    assert not failures, str(failures[0])


@pytest.mark.slow
def test_behind_haproxy(small, tmp_path):
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": str(PORT + 6), "RAY_SERVE_HAPROXY_STATS_PORT": str(PORT + 7)}
    settings = small.settings(limits={"max_queued": 2}, batching={"max_rows": 4, "max_images": 1})
    prompts = [f"crack {number}" for number in range(16)]
    with serving(settings, PORT + 5, tmp_path, "--haproxy", **ports) as served:
        served.wait_ready()
        assert set(send_all(served.url, small.cases()).kinds()) == {"ok"}
        heavy = [Case(IMAGES[0], fields(None, prompts=prompts, masks="none"))] * 24
        kinds = send_all(served.url, heavy, clients=24).kinds()
        # "wrong" has status 200: what was found is not compared.
        assert set(kinds) == {"wrong", "overloaded"}
        status, left = served.stop(signal.SIGTERM)
    assert (status, left) == (0, []), served.log.read_text()


def _open_to_others(served: Served) -> set[str]:
    """Processes that listen on more than this machine, by the first word of their title."""
    family = [served.process, *psutil.Process(served.process.pid).children(recursive=True)]
    found = set()
    for process in map(psutil.Process, [one.pid for one in family]):
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and "127.0.0.1" not in connection.laddr.ip:
                found.add(" ".join(process.cmdline()).removeprefix("ray::").partition(":")[0])
    return found


def _replicas(served: Served, **headers: str) -> int:
    lines = get(f"{served.url}/metrics", **headers)[1].splitlines()
    return sum(line.startswith("sam3lora_queue_length{") for line in lines)
