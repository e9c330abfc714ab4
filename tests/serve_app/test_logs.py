"""Where the modules of the service log to."""

from __future__ import annotations

import logging

import pytest

from serve_app.logs import log_as_serve


@pytest.fixture
def serves_log() -> list[str]:
    """Lines that Ray Serve's handler has written."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("ray.serve", "serve_app", "sam3lora")]
    loggers[0].addHandler(handler)
    yield lines
    for one in loggers:
        one.removeHandler(handler)


def test_our_warnings_are_in_serves_log_once(serves_log: list[str]) -> None:
    log_as_serve()
    log_as_serve()
    logging.getLogger("serve_app.replica.adapter_store").warning("adapter a cannot be used")
    logging.getLogger("sam3lora.engine").warning("of the engine")
    assert serves_log == ["adapter a cannot be used", "of the engine"]
