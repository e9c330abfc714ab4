"""The service on Ray Serve, from its start to the end of the requests in progress."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from sam3lora.cpus import usable_cpus
from sam3lora.errors import RunFailed, UserError
from sam3lora.local_ray import replaced
from sam3lora.processes_ahead import calls, start_ahead
from sam3lora.start_marks import mark

if TYPE_CHECKING:
    from serve_app.settings import ServeSettings

APPLICATION = "sam3lora"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_SPARE_HOST = "127.0.0.1"
_HTTP_START_S = 60.0


def run_service(
    settings: ServeSettings,
    host: str,
    port: int,
    address: str | None,
    *,
    is_direct: bool = False,
    announce: Callable[[], None],
) -> None:
    """Run the service until a signal; `announce` is called when it answers.

    With `is_direct` the application's HTTP process listens on the port itself, as `serve_app.settings.DIRECT` has it.
    Ray's own, which nobody needs then, gets another one of this machine alone.

    Raises:
        UserError: a mistake in the settings that the service itself meets.
        RunFailed: Ray Serve or the application did not start.
    """
    from sam3lora.cluster import ray_session
    from serve_app.replica.imports import IMPORT

    stop = threading.Event()
    _stop_by_signal(stop)
    replicas = settings.most_replicas
    num_cpus = replicas * settings.num_cpus + settings.ingress_replicas + 1
    with ray_session(address, num_cpus=num_cpus) as is_local:
        mark("Ray")
        if is_local:
            start_ahead(IMPORT, {}, count=settings.first_replicas, made_by_actor=False)
        if is_local and settings.torch_threads is None and not settings.num_gpus:
            # One core is left to the HTTP processes: a thread that is not scheduled holds all others up.
            threads = max(1, (usable_cpus() - 1) // replicas)
            settings = settings.model_copy(update={"torch_threads": threads})
        _stop_by_signal(stop)  # again: Ray has replaced the handlers by its own, which abort
        from ray import serve as ray_serve

        from serve_app.builder import QUIET, build_application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # request_timeout_s stays unset: the application has its own limit, and answers in JSON.
        ray_host, ray_port = (_SPARE_HOST, _unused_port(_SPARE_HOST)) if is_direct else (host, port)
        http = _start(ray_serve, {"host": ray_host, "port": ray_port}, QUIET)
        mark("Ray Serve")
        try:
            application = build_application(
                settings,
                direct_host=host if is_direct else None,
                replica_variables=calls(IMPORT) if is_local else None,
            )
            _deploy(ray_serve, application, stop)
            if not stop.is_set():
                if not is_direct:
                    _wait_for_http(http)
                _wait_for_port(_reachable(host), port, stop)
                announce()
                stop.wait()
                typer.echo("stopping after the requests in progress; Ctrl-C again stops at once", err=True)
        finally:
            _finish(ray_serve, settings, f"http://{_reachable(host)}:{port}", is_local=is_local)


def _unused_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def _stop_by_signal(stop: threading.Event) -> None:
    """The first signal stops the service after the requests in progress, a second one at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


def _start(ray_serve: Any, http_options: dict[str, Any], logging_config: dict[str, Any]) -> list[Any]:
    """Start Ray Serve, and return what tells when its HTTP processes listen: they start beside the model's process.

    Ray's own function would wait for them.
    """
    from ray.serve._private import api

    waiting: list[Any] = []
    create: Any = api._create_controller_and_proxy_refs

    def create_only(*arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
        controller, http = create(*arguments, **options)
        waiting.extend(http)
        return controller, []

    with replaced(api, create.__name__, create_only):
        ray_serve.start(http_options=http_options, logging_config=logging_config)
    return waiting


def _wait_for_http(waiting: list[Any]) -> None:
    import ray

    try:
        ray.get(waiting, timeout=_HTTP_START_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise RunFailed(f"Ray Serve does not listen: {str(error).strip().splitlines()[-1]}") from error


def _wait_for_port(host: str, port: int, stop: threading.Event) -> None:
    """Whoever listens, in front or not: an address is announced when it answers."""
    end_s = time.monotonic() + _HTTP_START_S
    while not stop.is_set():
        try:
            socket.create_connection((host.strip("[]"), port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise RunFailed(f"the service does not listen on {host}:{port}: {error.strerror or error}") from error
        stop.wait(0.1)


def _deploy(ray_serve: Any, application: Any, stop: threading.Event) -> None:
    try:
        target = ray_serve.RunTarget(application, name=APPLICATION, route_prefix="/")
        ray_serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while (status := ray_serve.status().applications[APPLICATION]).status == "DEPLOYING":
            if stop.wait(0.1):
                return
    except (RuntimeError, TimeoutError) as error:
        raise RunFailed(f"Ray Serve did not start: {error}") from error
    if status.status == "RUNNING":
        return
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    text = "\n".join(message for message in messages if message)
    if mistakes := re.findall(r"^(?:[\w.]+\.)?(?:UserError|ImageError): (.+)$", text, re.MULTILINE):
        raise UserError(mistakes[-1])
    raise RunFailed(f"the application did not start ({status.status}): {text or 'Ray gave no reason'}")


def _finish(ray_serve: Any, settings: ServeSettings, url: str, *, is_local: bool) -> None:
    """Refuse new requests, let those in progress end, and delete the application from a shared cluster.

    A local Ray ends with this process, and its HTTP process answers in our words until then. Serve's own shutdown would
    take the route away first: clients would read 404.
    """
    with contextlib.suppress(Exception):  # nothing was deployed, or an HTTP process died: nothing to wait for
        ingress = ray_serve.get_deployment_handle("Ingress", APPLICATION)
        ingress._init(_run_router_in_separate_loop=True)  # this thread has no event loop
        ingress.broadcast("drain", settings.limits.timeout_s).results(timeout_s=settings.limits.timeout_s + 5)
        if is_local:
            _wait_until_sent(url, settings.limits.timeout_s)
    if not is_local or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":  # Serve alone can stop HAProxy
        with contextlib.suppress(TimeoutError, RuntimeError):  # after a minute; or nothing was deployed
            ray_serve.delete(APPLICATION)
        if is_local:
            ray_serve.shutdown()


def _wait_until_sent(url: str, timeout_s: float) -> None:
    """Until the HTTP process has sent all answers."""
    from serve_app.http.front import NUM_BUSY

    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        with urllib.request.urlopen(f"{url}{NUM_BUSY}", timeout=timeout_s) as answer:
            if int(answer.read()) <= 0:
                return
        time.sleep(0.05)


def _reachable(host: str) -> str:
    """The name by which this machine reaches what listens on `host`."""
    if host in ("0.0.0.0", "::", *LOCAL_HOSTS):
        return "[::1]" if ":" in host else "127.0.0.1"
    return f"[{host}]" if ":" in host else host
