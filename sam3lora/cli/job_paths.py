"""Paths of submitted jobs."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError


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
