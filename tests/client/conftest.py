"""Fixtures of the client's tests."""

from __future__ import annotations

import pytest

from sam3lora.client import AsyncClient, Client


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> type:
    """Both clients, for what they have in common."""
    return request.param
