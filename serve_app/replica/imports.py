"""Imports of a model replica in a process that was started for it while Ray Serve starts."""

import contextlib
import importlib

from sam3lora.processes_ahead import is_ahead
from sam3lora.start_marks import mark

IMPORT = f"{__name__}.import_replica"
"""What the process of a model replica calls at its start."""


def import_replica() -> None:
    if is_ahead(IMPORT):
        with contextlib.suppress(Exception):  # the replica meets it again
            for module in ("ray.serve._private.replica", "serve_app.replica.deployed"):
                importlib.import_module(module)
            mark("imports ahead")
