"""Where the modules of the service log to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.logs import log_as_serve


@pytest.fixture
def serves_log(tmp_path: Path) -> Iterator[Path]:
    """The file that Ray Serve writes to."""
    handler = logging.FileHandler(tmp_path / "replica.log")
    loggers = [logging.getLogger(name) for name in ("ray.serve", "serve_app", "sam3lora")]
    loggers[0].addHandler(handler)
    yield tmp_path / "replica.log"
    for one in loggers:
        one.removeHandler(handler)
    handler.close()


def test_our_warnings_are_in_serves_log_once(serves_log: Path) -> None:
    log_as_serve()
    log_as_serve()
    logging.getLogger("serve_app.replica.adapter_store").warning("adapter a cannot be used")
    logging.getLogger("sam3lora.engine").warning("of the engine")
    assert serves_log.read_text().splitlines() == ["adapter a cannot be used", "of the engine"]
