"""Search spaces for the tests of sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sam3lora.tune.space.reader import SearchSpace, load_space

RANKS = {"lora.rank": {"choice": [4, 8, 16]}}


@pytest.fixture
def space_of() -> Callable[..., SearchSpace]:
    """Makes a search space on the tiny model: `space_of({parameter: {kind: ...}}, search={...}, ...)`."""

    def make(parameters: dict[str, Any] | None = None, **keys: Any) -> SearchSpace:
        return load_space({"base": "quick_test", "parameters": parameters or RANKS, **keys})

    return make
