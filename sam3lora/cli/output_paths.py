"""Checks of output paths, made before the work starts."""

from __future__ import annotations

import os
from pathlib import Path

from sam3lora.cluster import check_job_path
from sam3lora.errors import UserError


def check_output_folder(path: str | Path, option: str) -> None:
    """Refuse an output folder that is lost with a submitted job, or that cannot be made or written to.

    Raises:
        UserError: It is such a folder; names the option.
    """
    check_job_path(path, option)
    folder = Path(path).expanduser().absolute()
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} is {path}, but {there} is not a folder that can be written to: choose another one")


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, or the innermost existing folder around it."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))
