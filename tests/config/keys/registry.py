"""Which test shows that a configuration key acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])

TEST_OF_KEY: dict[str, Callable[..., Any]] = {}


def acts(*keys: str) -> Callable[[Test], Test]:
    """Mark a test as the one that shows what changing the keys changes; several keys only where it is parametrised."""

    def register(test: Test) -> Test:
        for key in keys:
            assert key not in TEST_OF_KEY, f"{key} has two tests: {TEST_OF_KEY[key].__name__} and {test.__name__}"
            TEST_OF_KEY[key] = test
        return test

    return register
