"""Fixtures of the service's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Runs `async def` tests with the mark `anyio`."""
    return "asyncio"
