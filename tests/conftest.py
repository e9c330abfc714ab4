"""Fixtures of every package's tests."""

from __future__ import annotations

import atexit
import gc
import itertools
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from .base_cache import read_bases_once

_NUMBERS = itertools.count()

# One token for all Rays of the tests: a process keeps the authentication of its first Ray, and where a later one has
# another, its actors end before they run. Without a token, Ray would write one to the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: processes that share the cores take one each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Passes of the garbage collector through all that was imported would take a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
    atexit.register(gc.unfreeze)  # libraries complain about objects that are left at the end


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs of this session keep features and frames: away from the user's cache."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAM3LORA_CACHE", str(folder / "session"))
        yield folder


@pytest.fixture(autouse=True)
def cache_folder(_caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test; made when a run needs it."""
    folder = _caches / str(next(_NUMBERS))
    monkeypatch.setenv("SAM3LORA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _bases_are_read_once() -> None:
    read_bases_once()


@pytest.fixture(autouse=True)
def _restore_log_level() -> Iterator[None]:
    logger = logging.getLogger("sam3lora")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of a small random SAM 3 (112 pixels), which trains in milliseconds; read only."""
    from .model.conftest import save_base  # imports torch: not for tests that do without

    return save_base(tmp_path_factory.mktemp("base") / "sam3")


@pytest.fixture(scope="session")
def spread_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of a small random SAM 3 whose outputs differ for every input; read only."""
    from .engine.engine_cases import write_base

    return write_base(tmp_path_factory.mktemp("spread") / "sam3")


@pytest.fixture(scope="session")
def clickable_base(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`spread_base` as a video checkpoint, with a random tracker whose masks differ for every click; read only."""
    from .engine.engine_cases import spread
    from .model.clicks.video_checkpoint import write_video_checkpoint

    folder = tmp_path_factory.mktemp("clickable") / "sam3"
    write_video_checkpoint(folder, source=spread_base, change=spread)
    return folder


@pytest.fixture(scope="session")
def clickable_root(clickable_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters over `clickable_base`, read only.

    "towers" changes the trunk and "heads" does not; of task clicks "edges" and "holes" (DoRA) go with the base's trunk,
    and "over-towers" with that of "towers".
    """
    from .engine.engine_cases import write_adapter
    from .model.clicks.click_adapters import write_click_adapters

    root = tmp_path_factory.mktemp("clickable_adapters")
    write_adapter(root / "towers", clickable_base, "vision", 1)
    write_adapter(root / "heads", clickable_base, "no cls", 2)
    write_click_adapters(root, clickable_base, over=root / "towers")
    return root
