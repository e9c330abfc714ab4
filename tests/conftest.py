"""Fixtures of every package's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of a small random SAM 3 (112 pixels), which trains in milliseconds; read only."""
    from .model.conftest import save_base  # imports torch: not for tests that do without

    return save_base(tmp_path_factory.mktemp("base") / "sam3")
