"""Mounts that only the processes of one drill see."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from jobs.bench.drill.runs import DrillFailed


@contextlib.contextmanager
def mounted(mount: str) -> Iterator[int]:
    """The process that holds a mount namespace in which the shell command `mount` has run.

    Raises:
        DrillFailed: This system allows no mounts in a user namespace.
    """
    holder = subprocess.Popen(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            f"{mount} && echo ready && exec sleep infinity",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if holder.stdout is None or holder.stdout.readline().strip() != "ready":
            raise DrillFailed(f"cannot mount here, as by unshare --user --mount sh -c {mount!r}")
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def enter(holder: int) -> list[str]:
    """Words before a command that run it in the namespace."""
    return ["nsenter", "-U", "-m", "--preserve-credentials", "-t", str(holder)]
