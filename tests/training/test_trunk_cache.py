"""Features in memory, ahead of use and in 8 bits, in a worker."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
import torch

from sam3lora.data import array_store
from sam3lora.training.features import trunk_cache

from .feature_cases import BF16, FROZEN, INT8, LAST_LAYER, OFF, ON_DISK, arrays, counts_of, feature_files, step_of
from .run_folder import assert_equal
from .two_workers import make_trainer


def batch_of(worker):
    return next(worker.batches.training_batches(0, 0))


@pytest.mark.parametrize("limit_gb", ["1.0", "0"])
def test_features_in_memory_need_no_file(make_config, cache_folder, limit_gb):
    worker = make_trainer(make_config(FROZEN, f"training.cache_memory_gb={limit_gb}"))
    expected, _ = step_of(worker)
    for file in feature_files(cache_folder):
        file.unlink()
    gradients, _ = step_of(worker)
    assert_equal(gradients, expected)
    assert counts_of(worker) == ((2, 2) if limit_gb == "1.0" else (4, 0))


def test_what_the_disk_has_no_room_for_stays_in_memory(make_config, cache_folder):
    worker = make_trainer(make_config(FROZEN, "training.cache_gb=1e-6"))
    assert [step_of(worker) and counts_of(worker) for _ in range(2)] == [(2, 0), (2, 2)]
    assert arrays(cache_folder) == []


def test_a_run_that_reads_no_file_still_counts_as_using_the_store(make_config, cache_folder, monkeypatch):
    worker = make_trainer(make_config(FROZEN))
    step_of(worker)
    batch = batch_of(worker)
    monkeypatch.setattr(trunk_cache, "_SECONDS_BETWEEN_TOUCHES", 0.0)
    monkeypatch.setattr(array_store, "_SECONDS_BETWEEN_SIGNS", 0.0)
    [*runs] = (cache_folder / "runs").iterdir()
    for run in runs:
        os.utime(run, (1, 1))
    with torch.no_grad():
        worker.runner.images.of_batch(batch)
    assert max(run.stat().st_mtime for run in runs) > 1


def test_read_ahead_of_use(make_config, cache_folder):
    # The files may go once they are read; what was read only for a batch goes with it.
    step_of(make_trainer(make_config(FROZEN)))
    worker = make_trainer(make_config(FROZEN, ON_DISK))
    images, batch = worker.runner.images, batch_of(worker)
    images.load_ahead(batch)
    for file in feature_files(cache_folder):
        file.unlink()
    with torch.no_grad():
        first = images.of_batch(batch)
    assert counts_of(worker) == (0, 2)
    plain = make_trainer(make_config(FROZEN, OFF))
    with torch.no_grad():
        expected = plain.runner.images.of_batch(batch_of(plain))
    for one, other in zip(first.maps_ICHW, expected.maps_ICHW, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        images.of_batch(batch)  # makes them again, and the files
    images.load_ahead(batch)
    assert len(images.trunk.memory) == 2
    del batch
    gc.collect()
    assert len(images.trunk.memory) == 0


@pytest.mark.parametrize("overrides", [[FROZEN, BF16], [LAST_LAYER]], ids=["frozen-autocast", "last-layer"])
def test_int8_is_close(make_config, cache_folder, overrides):
    # Losses within 1 %, gradients within an angle of 0.1; the same whether made or read.
    exact, exact_terms = step_of(make_trainer(make_config(*overrides, OFF)))
    worker = make_trainer(make_config(*overrides, INT8, ON_DISK))
    made, made_terms = step_of(worker)
    read, read_terms = step_of(worker)
    assert counts_of(worker) == (2, 2)
    assert_equal(read, made)
    assert_equal(read_terms, made_terms)
    assert {(array.shape, array.dtype) for array in arrays(cache_folder)} == {((64, 36), np.dtype(np.uint8))}
    together = [torch.cat([gradients[name].flatten() for name in exact]) for gradients in (made, exact)]
    assert not torch.equal(*together)
    assert torch.cosine_similarity(*together, dim=0) > 0.995
    for name, value in exact_terms.items():
        assert made_terms[name].item() == pytest.approx(value.item(), rel=0.01, abs=1e-3), name
