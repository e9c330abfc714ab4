"""No key without a test that it acts: a new key fails here until somebody shows what it does."""

from __future__ import annotations

import importlib
from pathlib import Path

from sam3lora.config.keys import known_keys

from .conftest import TEST_OF_KEY


def test_every_key_has_a_test_that_it_acts():
    for file in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f".{file.stem}", __package__)
    assert sorted(set(known_keys()) - set(TEST_OF_KEY)) == []
    # And no test of a key that is gone.
    assert sorted(set(TEST_OF_KEY) - set(known_keys())) == []
