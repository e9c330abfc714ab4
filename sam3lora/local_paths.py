"""Paths that users give: an address or an unknown home is refused, a relative one means the folder of the command."""

from __future__ import annotations

import re
from pathlib import Path

from sam3lora.errors import UserError

# `Path` makes one slash of two. A scheme has two letters at least: C:/ is a drive.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def path_problem(path: object) -> str | None:
    """What is wrong with `s3://...`, `file://...`, `https://...` or `~nobody/...` in place of a path; None for a path.

    >>> path_problem("s3://bucket/run")[:32]
    's3://bucket/run is an address: e'
    >>> path_problem("runs/s3"), path_problem("C:/runs")
    (None, None)
    """
    found = _ADDRESS.match(str(path))
    if found is None:
        try:
            Path(str(path)).expanduser()
        except RuntimeError:
            return f"{path}: the home folder of {Path(str(path)).parts[0]} is not known here. Write the path in full"
        return None
    address = path if isinstance(path, str) else f"{found[1]}://{str(path)[found.end() :]}"
    return (
        f"{address} is an address: expected a path. Mount that storage and give the path of the mount, or download "
        "what is read before and copy what is written afterwards"
    )


def refuse_bad_path(path: object, name: str) -> None:
    """Refuse an address, or the home of an unknown user, where files are read or written.

    Args:
        path: as the user gave it.
        name: of the option, key or argument.

    Raises:
        UserError: The message names it.
    """
    if problem := path_problem(path):
        raise UserError(f"{name}: {problem}")


def absolute_path(path: str | Path) -> str:
    """The path from the root, by the home and working folder of this process: workers have others."""
    return str(Path(path).expanduser().absolute())


def absolute_base(name: str) -> str:
    """The absolute path of a base model's folder; `tiny` and hub ids as they are."""
    return absolute_path(name) if name != "tiny" and Path(name).expanduser().is_dir() else name
