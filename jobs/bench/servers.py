"""Servers under test: started in processes of their own, waited for, and stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sam3lora.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server; `start_s` is how long it took until it was ready."""

    url: str
    pid: int
    start_s: float


def plain_command(model: str | Path, adapters: Path, *, device: str = "cpu") -> list[str]:
    """FastAPI around stock transformers and PEFT (`jobs.bench.plain_server`)."""
    from sam3lora.model.base_folder import find_base

    # transformers does not know "tiny"
    folder = find_base(str(model), local_files_only=True).path
    command = [sys.executable, "-m", "jobs.bench.plain_server", "--model", str(folder), "--device", device]
    return [*command, "--adapters", str(adapters)]


def our_command(model: str | Path, adapters: Path, *, haproxy: bool = False, config: Path | None = None) -> list[str]:
    """`sam3lora serve` as a user starts it."""
    command = [sys.executable, "-m", "sam3lora", "serve", "--model", str(model), "--adapters", str(adapters)]
    return [*command, *(["--haproxy"] if haproxy else []), *(["--config", str(config)] if config else [])]


@contextlib.contextmanager
def plain_server(model: str | Path, adapters: Path, log: Path) -> Iterator[Server]:
    with started(plain_command(model, adapters), log) as starting:
        yield starting.wait()


@contextlib.contextmanager
def our_server(
    model: str | Path,
    adapters: Path,
    log: Path,
    *,
    haproxy: bool = False,
    port: int | None = None,
    config: Path | None = None,
) -> Iterator[Server]:
    """On any free port if none is given."""
    with started(our_command(model, adapters, haproxy=haproxy, config=config), log, port) as starting:
        yield starting.wait()


@dataclass(frozen=True)
class StartingServer:
    """A process that becomes a server, and what it prints."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    begin_s: float

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> Server:
        """The server, when it is ready.

        Raises:
            UserError: It ended, or was not ready in time; the message holds the end of what it printed.
        """
        _wait_until_ready(self.url, self.process, self.log, timeout_s)
        return Server(self.url, self.process.pid, time.monotonic() - self.begin_s)


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, port: int | None = None) -> Iterator[StartingServer]:
    """The command with `--port P`, stopped at the end of the block."""
    port = port or free_port()
    begin_s = time.monotonic()
    with log.open("wb") as output:
        # A session of its own: an interrupt at the keyboard reaches this process alone, which then stops the server.
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield StartingServer(f"http://127.0.0.1:{port}", process, log, begin_s)
    finally:
        _stop(process)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _answers(f"{url}/readyz"):
        if process.poll() is not None or time.monotonic() > deadline:
            became = "was not ready in time" if process.returncode is None else f"ended with {process.returncode}"
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise UserError(f"the server {became} ({' '.join(map(str, process.args[1:4]))} ...): {said}")  # type: ignore
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """Below the range from which the system hands out ports: nobody takes it in the seconds until the server does."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise UserError("none of 100 ports from 20000 to 32000 is free")
