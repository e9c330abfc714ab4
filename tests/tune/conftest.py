"""Search spaces for the tests of sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam3lora.data.synth.dataset import write_dataset
from sam3lora.tune.space.reader import SearchSpace, load_space

RANKS = {"lora.rank": {"choice": [4, 8, 16]}}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 training and 2 validation images; read only."""
    folder = tmp_path_factory.mktemp("data") / "data"
    return write_dataset(folder, num_train=4, num_valid=2, size=112, seed=4, progress=False)


@pytest.fixture
def space_of() -> Callable[..., SearchSpace]:
    """Makes a search space on the tiny model: `space_of({parameter: {kind: ...}}, search={...}, ...)`."""

    def make(parameters: dict[str, Any] | None = None, **keys: Any) -> SearchSpace:
        return load_space({"base": "quick_test", "parameters": parameters or RANKS, **keys})

    return make
