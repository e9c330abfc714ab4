"""Joining the Ray that is there, or starting one for a while."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sam3lora.errors import UserError

_CONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def ray_session(address: str | None, *, num_cpus: float, dashboard: bool = False) -> Iterator[bool]:
    """The Ray that is running or named, or a local one, for the duration of the block.

    Args:
        address: of a cluster; None takes `RAY_ADDRESS`, or starts a local Ray if that is not set.
        num_cpus: logical CPUs of a local Ray: a small machine takes as many workers as it is asked for.
        dashboard: start one with a local Ray; Ray Train needs it to free what a killed run had reserved.

    Yields:
        Whether it is a local one, for this block alone.

    Raises:
        UserError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address and address != "local":
        _join(address, quiet)
    else:
        address = "local"
        options = {
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": _store_bytes(),
            **quiet,
        }
        ray.init(address=address, num_cpus=math.ceil(num_cpus), **options)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def check_job_path(path: str | Path, option: str) -> None:
    """Refuse a relative path in a submitted job: its working directory is a temporary copy.

    Raises:
        UserError: This is such a job, and the path is relative; names the option.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(path).expanduser().is_absolute():
        raise UserError(
            f"{option} is {path}, but a submitted job runs in a temporary copy of the working directory: give {option} "
            "an absolute path on storage that all hosts see"
        )


@contextlib.contextmanager
def environment(names: Mapping[str, str]) -> Iterator[None]:
    """What Ray reads from the environment, for the duration of the block."""
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


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"cannot work through the Ray Client address {address}: submit a job on the cluster instead: "
            "ray job submit --working-dir . -- python jobs/train.py CONFIG, or jobs/validate.py, jobs/predict.py"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:  # Ray itself would try for many minutes, deaf to interrupts
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({error}): check scaling.address, --address or RAY_ADDRESS, and "
                "whether the cluster runs"
            ) from error
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the Ray cluster at {address}: {error}. Expected auto or HOST:PORT") from error


def _store_bytes() -> int:
    """Bytes of a local object store: images in flight are all it holds."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(4e9, max(3e8, 0.15 * total)))
