"""Starting a Ray of this process on this machine: on the loopback interface, with a token, and with few processes."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_KEEP_PROCESSES = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}
"""Ray would end those beyond one for each CPU after an idle second, such as one that has just imported decoding."""


def start_local_ray(num_cpus: float, *, dashboard: bool = False, workers_ahead: bool = True, **options: Any) -> None:
    """Start Ray and connect to it.

    Args:
        num_cpus: Logical CPUs.
        dashboard: Start its server, too.
        workers_ahead: Start a process for each CPU at once. Those of Ray Train have an environment of their own, so
            that they cannot take one.
        **options: Of `ray.init`.
    """
    import ray

    variables = _token_of_local_ray()
    variables |= {name: os.environ.get(name, value) for name, value in _KEEP_PROCESSES.items()}
    if not workers_ahead:
        variables["RAY_prestart_worker_first_driver"] = "0"
    with _on_loopback(), _with_few_processes(dashboard=dashboard), environment(variables):
        ray.init(
            address="local",
            num_cpus=math.ceil(num_cpus),
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=_store_bytes(),
            **options,
        )


@contextlib.contextmanager
def environment(names: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that Ray reads, set for the duration of the block."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts within the block, and its later processes, listen on 127.0.0.1 instead of all interfaces.

    Ray has this switch for desktop systems, and reads its variable when it is imported.
    """
    from ray._private import ray_constants

    off = environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"})
    with replaced(ray_constants, "ENABLE_RAY_CLUSTER", False), off:
        yield


@contextlib.contextmanager
def _with_few_processes(*, dashboard: bool) -> Iterator[None]:
    """A Ray that starts within the block has no autoscaler, no log monitor and, if not asked for, no dashboard server.

    Each is a Python process that takes a second to start, and `ray.init` waits for the last one. One machine has
    nothing to scale, and no log goes to the driver. `ray.init` has no options for them; `ray start` has for two.
    """
    from ray._private import parameter, services

    with contextlib.ExitStack() as changed:
        options: Any = {"no_monitor": True, "include_log_monitor": False}
        few = functools.partial(parameter.RayParams, **options)
        changed.enter_context(replaced(parameter, "RayParams", few))
        if not dashboard:
            none = "", None  # its address and its process
            changed.enter_context(replaced(services, "start_api_server", lambda *_, **__: none))
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[Any]:
    """A function or class of Ray's that has another value for the duration of the block; yields its own."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield own
    finally:
        setattr(module, name, own)


def _token_of_local_ray() -> dict[str, str]:
    """The variable by which a local Ray gets a token of this process, unless the user has one or wants none.

    Ray would else write a token to the home folder, and every later `ray start --head` of this user would ask for it,
    while `ray job submit` does not send it.
    """
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    has_one = named or (Path.home() / ".ray" / "auth_token").is_file()
    is_off = os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    return {} if has_one or is_off else {"RAY_AUTH_TOKEN": _own_token()}


@functools.cache
def _own_token() -> str:
    """One for all local Rays of this process, as Ray keeps the first that it reads."""
    return secrets.token_hex(32)


def _store_bytes() -> int:
    """Bytes of a local object store, which holds only images in flight."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(4e9, max(3e8, 0.15 * total)))
