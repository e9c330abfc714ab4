"""Where results go: said before the work is done, not after."""

from __future__ import annotations

import os
from pathlib import Path

from sam3lora.errors import UserError


def check_output_path(path: str | Path, option: str) -> None:
    """A submitted job runs in a temporary copy of the working directory, which goes away with its results.

    Raises:
        UserError: this is such a job, and the path is relative.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(path).expanduser().is_absolute():
        raise UserError(
            f"{option} is {path}, which a submitted job would write into its temporary working directory: give "
            f"{option} an absolute path on storage that all hosts see"
        )


def check_output_folder(path: str | Path, option: str) -> None:
    """As `check_output_path`, for a folder that is there or can be made.

    Raises:
        UserError: the results would be lost with a submitted job, or cannot be written.
    """
    check_output_path(path, option)
    folder = Path(path).expanduser().absolute()
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} is {path}, but {there} is no folder that can be written to: choose another one")


def nearest_existing(path: Path) -> Path:
    """The path itself, or the innermost folder around it that is there."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))
