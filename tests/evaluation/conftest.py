"""A generated data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam3lora.data.synth.dataset import write_dataset

SIZE = 96


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "data"
    return write_dataset(folder, num_train=1, num_valid=4, size=SIZE, seed=1, progress=False)
