"""Paths that users give: an address in place of one is refused, a relative one means the folder of the command."""

from __future__ import annotations

import re
from pathlib import Path

from sam3lora.errors import UserError

# `Path` makes one slash of two. A scheme has two letters at least: C:/ is a drive.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def address_problem(path: object) -> str | None:
    """What is wrong with `s3://...`, `gs://...`, `file://...` or `https://...` in place of a path; None for a path.

    >>> address_problem("s3://bucket/run")[:32]
    's3://bucket/run is an address: e'
    >>> address_problem("runs/s3"), address_problem("C:/runs")
    (None, None)
    """
    found = _ADDRESS.match(str(path))
    if found is None:
        return None
    address = path if isinstance(path, str) else f"{found[1]}://{str(path)[found.end() :]}"
    return (
        f"{address} is an address: expected a path. Mount that storage and give the path of the mount, or download "
        "what is read before and copy what is written afterwards"
    )


def refuse_address(path: object, name: str) -> None:
    """Refuse an address where files are read or written.

    Args:
        path: as the user gave it.
        name: of the option, key or argument.

    Raises:
        UserError: It is an address; the message names it.
    """
    if problem := address_problem(path):
        raise UserError(f"{name}: {problem}")


def absolute_path(path: str | Path) -> str:
    """The path from the root, by the home and working folder of this process: workers have others."""
    return str(Path(path).expanduser().absolute())


def absolute_base(name: str) -> str:
    """The absolute path of a base model's folder; `tiny` and hub ids as they are."""
    return absolute_path(name) if name != "tiny" and Path(name).expanduser().is_dir() else name
