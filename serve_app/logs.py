"""The log of the service: what its own modules say goes where Ray Serve writes."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler


def log_as_serve() -> None:
    """Give our loggers the files of Ray Serve's, in a process that Serve has started.

    Without any they would write to the standard error, which Serve takes as information and drops.
    """
    handlers = [
        handler
        for handler in logging.getLogger("ray.serve").handlers
        if isinstance(handler, (logging.FileHandler, MemoryHandler))
    ]
    for name in ("serve_app", "sam3lora"):
        ours = logging.getLogger(name)
        for handler in handlers:
            if handler not in ours.handlers:
                ours.addHandler(handler)
