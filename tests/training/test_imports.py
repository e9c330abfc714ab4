"""Imports of a worker that began before it was one."""

from __future__ import annotations

import importlib

import pytest
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from sam3lora.training import imports, on_ray


@pytest.fixture
def imported(monkeypatch) -> list[str]:
    """Names of what is imported; the first that is asked for after Ray Train fails once."""
    names, broken = [], ["ray.train.torch.config"]

    def import_module(name: str):
        names.append(name)
        if name in broken:
            broken.remove(name)
            raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(imports, "_begun", [])
    return names


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_worker_has_imported_everything_whoever_began(is_ahead, imported, monkeypatch):
    monkeypatch.setattr(imports, "is_ahead", lambda function: is_ahead and function == imports.BEGIN)
    imports.begin_imports()
    assert bool(imported) == is_ahead
    if not is_ahead:  # a process that reads data, or that of a worker which takes the place of another
        with pytest.raises(ImportError):
            imports.finish_imports()
    imports.finish_imports()  # also what failed on the thread
    assert imported[-2:] == ["ray.train.torch.config", "sam3lora.training.worker"]


def test_variables_of_workers_are_those_that_ray_train_gives_them(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "77")  # the user's own
    found, expected = on_ray._variables_of_workers(), get_env_vars_to_propagate()
    assert found == {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **expected}
    assert found["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "77"
