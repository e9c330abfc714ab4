"""Fixtures of the service's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def spread_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of a small random SAM 3 whose outputs differ for every input; read only."""
    from ..engine.engine_cases import write_base

    return write_base(tmp_path_factory.mktemp("spread") / "sam3")


@pytest.fixture
def anyio_backend() -> str:
    """Runs `async def` tests with the mark `anyio`."""
    return "asyncio"
