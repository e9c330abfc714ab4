"""The number of images in a forward: what is measured, what is chosen, and that nothing of it remains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sam3lora.data.index_columns import keep_annotations
from sam3lora.data.sample import DecodeSettings, record_queries
from sam3lora.errors import OutOfMemory
from sam3lora.training import distributed, fit_batch
from sam3lora.training.fit_batch import fitting, largest_that_fits, most_queries_and_objects

from ..data.random_index import CATEGORIES, draw_table
from .two_workers import make_trainer

GB = 2**30
MERGED = {"prompts_map": dict.fromkeys(CATEGORIES[:2], "defect")}


def test_memory_is_extrapolated_from_one_and_two_images():
    # 3 GB for one image and 2 GB for each further one: 4 images take 9 GB, 8 take 17 GB.
    sizes = [1, 2, 4, 8]
    assert [fitting(sizes, 3 * GB, 2 * GB, allowed * GB) for allowed in (1, 3, 5, 8.9, 9, 16.9, 17, 99)] == [
        *(1, 1, 2, 2, 4, 4, 8, 8)
    ]


def test_sizes_are_tried_until_one_does_not_fit():
    # 1 GB in use and 2 GB an image. The device has a limit beyond which it runs out of memory.
    def fits(sizes, *, allowed, limit):
        def peak_bytes(size):
            tried.append(size)
            if 1 + 2 * size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return (1 + 2 * size) * GB

        tried = []
        return largest_that_fits(sizes, peak_bytes, allowed * GB), tried

    assert fits([1, 2, 4, 8], allowed=9.1, limit=10) == (4, [1, 2, 4, 8])  # 8 runs out of memory
    assert fits([1, 2, 4], allowed=5.05, limit=10) == (2, [1, 2, 4])  # 4 takes more than its share
    assert fits([1, 3], allowed=9.1, limit=10) == (3, [1, 3])
    assert fits([1, 2, 4], allowed=9.1, limit=2) == (0, [1])
    with pytest.raises(RuntimeError, match="shape"):  # any other error is not about memory
        largest_that_fits([1], lambda size: (_ for _ in ()).throw(RuntimeError("shape")), GB)


@pytest.mark.parametrize("override", ["lora.apply_to_vision_encoder=true", "lora.apply_to_vision_encoder=false"])
def test_measuring_leaves_nothing_behind(make_config, monkeypatch, override):
    # Weights, gradients, random state and the cache are as they were, with and without kept features.
    monkeypatch.setattr(fit_batch, "available_bytes", lambda: 100 * GB)
    worker = make_trainer(make_config(override))
    before = {name: parameter.clone() for name, parameter in worker.model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured = []
    backward = type(worker.runner).backward
    monkeypatch.setattr(
        type(worker.runner),
        "backward",
        lambda runner, batch, *rest: measured.append(batch) or backward(runner, batch, *rest),
    )
    config = worker.config.changed({"training.batch_size": "auto"})
    found = fit_batch.resolve_batch_size(config, worker.model, worker.runner, worker.data, 6).training
    assert found.batch_size == 6
    assert {batch.num_images for batch in measured} == {1, 2}
    # an adapted text tower keeps a graph of each distinct prompt
    assert all(len(set(b.prompts_B)) == min(b.num_queries, len(worker.data.prompts)) for b in measured)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in worker.model.named_parameters())
    assert all(parameter.grad is None for parameter in worker.model.parameters())
    assert worker.runner.images.vision_passes == 0

    # As costly as any batch of the split.
    real = list(worker.batches.training_batches(0, 0))
    queries = [(batch.query_image_B == image).sum() for batch in real for image in range(batch.num_images)]
    assert measured[0].num_queries == max(queries)
    assert max(len(batch.boxes_cxcywh_T4) for batch in measured) >= max(len(b.boxes_cxcywh_T4) for b in real)


@pytest.mark.parametrize(("others", "size"), [([6, 6], 6), ([2, 3], 2), ([6, 0], None)])
def test_all_workers_take_the_smallest(make_config, monkeypatch, others, size):
    # This worker could take 6 images; one of the others takes fewer, or not even one.
    worker = make_trainer(make_config())
    config = worker.config.changed({"training.batch_size": "auto"})
    monkeypatch.setattr(fit_batch, "_fitting_on_cpu", lambda backward, sizes, share: sizes[-1])
    monkeypatch.setattr(
        distributed, "gather_objects", lambda value: [value, *others] if isinstance(value, int) else [value]
    )
    if size is None:
        with pytest.raises(OutOfMemory):
            fit_batch.resolve_batch_size(config, worker.model, worker.runner, worker.data, 6)
        return
    found = fit_batch.resolve_batch_size(config, worker.model, worker.runner, worker.data, 6).training
    assert found.batch_size == size


@pytest.mark.parametrize("num_negatives", [None, -1, 0, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"exhaustive": False}, {"exhaustive": CATEGORIES[:2]}, {"negative_prompts": ("rust", "dust")}, MERGED],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_costliest_image_is_the_one_of_all_records(seed, changes, num_negatives):
    table = draw_table(seed)
    settings = replace(DecodeSettings(names=(*CATEGORIES, "never seen")), num_negatives=num_negatives, max_objects=2)
    settings = replace(settings, **changes)
    asked = [record_queries(record, settings) for record in table.to_pylist()]
    most_queries = max(len(queries) for queries in asked)
    most_objects = max(sum(min(2, len(query.annotation_rows)) for query in queries) for queries in asked)
    assert most_queries_and_objects(table, settings) == (most_queries, most_objects)
    assert most_queries_and_objects(keep_annotations(table, np.zeros(200, dtype=bool)), settings)[1] == 1
