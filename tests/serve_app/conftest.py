"""Fixtures of the service's tests."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serve_app.replica.replica import ModelReplica

    from .replica_cases import Gate

LONG_S = 60.0


@pytest.fixture
def anyio_backend() -> str:
    """Runs `async def` tests with the mark `anyio`."""
    return "asyncio"


@pytest.fixture(scope="session")
def root(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters over `spread_base` and a broken one, read only. Modules may have another `root`."""
    from .replica_cases import write_root

    return write_root(tmp_path_factory.mktemp("adapters"), spread_base)


@pytest.fixture(scope="session")
def clickable_tasks(clickable_base: Path, clickable_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of `clickable_root` and "gears" of task dense, read only."""
    from ..model.dense.dense_cases import write_dense

    root = shutil.copytree(clickable_root, tmp_path_factory.mktemp("clickable_tasks") / "root")
    write_dense(clickable_base, root / "gears")
    return root


@pytest.fixture
def play(spread_base: Path, root: Path) -> Callable[..., AbstractAsyncContextManager[ModelReplica]]:
    """Opens a replica over the `root` of adapters, which is closed at the end of the block.

    It encodes no images ahead unless a test asks for it: batches then depend on the requests alone.
    """

    from serve_app.replica.replica import ModelReplica
    from serve_app.settings import AdapterSettings, Batching, ServeSettings

    @asynccontextmanager
    async def play(engine: Any = None, **settings: Any) -> AsyncIterator[ModelReplica]:
        values = {
            "model": str(spread_base),
            "adapters": AdapterSettings(root=root),
            "max_resident_adapters": 2,
            "batching": Batching(encode_ahead=False),
        }
        service = ModelReplica(ServeSettings(**values | settings), engine=engine)
        async with asyncio.timeout(LONG_S):
            yield service
            await service.close()

    return play


@pytest.fixture
def gate(spread_base: Path) -> Gate:
    """The model of a replica, which a test can hold."""
    from .replica_cases import Gate

    return Gate.load(str(spread_base), device="cpu", num_slots=2)
