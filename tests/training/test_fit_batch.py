"""The numbers of images and of prompts in a forward: what is measured and chosen, and that nothing of it remains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sam3lora.data.index_columns import keep_annotations
from sam3lora.data.sample import DecodeSettings, record_queries
from sam3lora.errors import OutOfMemory
from sam3lora.training import distributed, fit_batch, forward_sizes, worker
from sam3lora.training.costliest_batch import most_queries_and_objects
from sam3lora.training.fit_batch import fitting
from sam3lora.training.forward_sizes import image_sizes, largest_that_fits, prompt_sizes, prompts_on_cpu

from ..data.random_index import CATEGORIES, draw_table
from .two_workers import make_trainer

GB = 2**30
MERGED = {"prompts_map": dict.fromkeys(CATEGORIES[:2], "defect")}
AUTO = {"training.batch_size": "auto", "training.max_prompts_per_forward": "auto"}


# ---- what is chosen --------------------------------------------------------------------------------------------------


def test_memory_is_extrapolated_from_one_and_two_images():
    # 3 GB for one image and 2 GB for each further one: 4 images take 9 GB, 8 take 17 GB.
    sizes = [1, 2, 4, 8]
    assert [fitting(sizes, 3 * GB, 2 * GB, allowed * GB) for allowed in (1, 3, 5, 8.9, 9, 16.9, 17, 99)] == [
        *(1, 1, 2, 2, 4, 4, 8, 8)
    ]


def test_sizes_to_try():
    assert image_sizes(6) == [1, 2, 3, 6]  # 4 or 5 images would take two forwards, as 3 do
    assert prompt_sizes(1) == [1]
    assert prompt_sizes(6) == [1, 2, 4, 6]  # never more than a forward has
    assert prompt_sizes(8) == [1, 2, 4, 8]
    assert prompt_sizes(160) == [1, 2, 4, 8, 16, 32]


def test_a_cpu_takes_prompts_by_the_size_of_the_images():
    assert [prompts_on_cpu(side) for side in (112, 224, 336, 1008)] == [32, 8, 2, 1]


def choose(images, prompts, *, allowed, of_image=2, of_prompt=1, num_queries=4):
    """The choice where 1 unit is in use, beside `of_image` for an image and `of_prompt` for a prompt at a time."""

    def peak_bytes(size, number):
        tried.append((size, number))
        return 1 + of_image * size + of_prompt * min(number, size * num_queries)

    tried: list[tuple[int, int]] = []
    return largest_that_fits(images, prompts, num_queries, peak_bytes, allowed), tried


def test_prompts_alone_are_tried_from_the_most():
    # Two images: 5 units, and one for each prompt at a time.
    assert choose([2], [1, 2, 4, 8], allowed=13) == ((2, 8), [(2, 8)])
    assert choose([2], [1, 2, 4, 8], allowed=12.9) == ((2, 4), [(2, 8), (2, 4)])
    assert choose([2], [1, 2, 4, 8], allowed=6)[0] == (2, 1)
    assert choose([2], [1, 2, 4, 8], allowed=5.9) == ((0, 0), [(2, 8), (2, 4), (2, 2), (2, 1)])


def test_images_alone_are_tried_from_the_fewest():
    assert choose([1, 2, 4], [4], allowed=9) == ((2, 4), [(1, 4), (2, 4), (4, 4)])
    assert choose([1, 2, 4], [4], allowed=99)[0] == (4, 4)
    assert choose([1, 2, 4], [4], allowed=6.9)[0] == (0, 0)


def test_prompts_come_before_images():
    # 16 prompts need all four images (25 units), 8 need two of them (13), and 4 need one (7).
    images, prompts = [1, 2, 4], [1, 2, 4, 8, 16]
    assert choose(images, prompts, allowed=25)[0] == (4, 16)
    # 8 prompts fit, and two more images beside them do (17) or do not.
    assert choose(images, prompts, allowed=24.9)[0] == (4, 8)
    assert choose(images, prompts, allowed=16.9) == ((2, 8), [(4, 16), (2, 8), (4, 8)])
    # 2 prompts of one image (5); two images would take 7.
    assert choose(images, prompts, allowed=6.9)[0] == (1, 2)
    assert choose(images, prompts, allowed=3.9)[0] == (0, 0)


def test_more_memory_never_chooses_fewer_prompts():
    found = [choose([1, 2, 3, 6], prompt_sizes(24), allowed=allowed)[0] for allowed in range(3, 60)]
    assert found[0] == (0, 0)
    assert found[-1] == (6, 24)
    assert all(prompts <= more for (_, prompts), (_, more) in pairwise(found))


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend_gpu(monkeypatch):
    """torch.cuda of a GPU of 24 GB, 4 of which others use and 2 of which this process has reserved."""
    found = {"fraction": 1.0, "peak": 0.0}
    for name, value in {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (18 * GB, 24 * GB),
        "memory_reserved": lambda: 2 * GB,
        "max_memory_reserved": lambda: found["peak"],
        "get_per_process_memory_fraction": lambda: found["fraction"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    return found


def test_what_is_allowed_on_a_gpu(pretend_gpu):
    def allowed(workers, share):
        return forward_sizes.allowed_on_gpu(workers, share) / GB

    assert allowed(1, 1.0) == pytest.approx(2 + 0.9 * 18)
    assert allowed(2, 1.0) == pytest.approx(2 + 0.9 * 9)  # another worker of the run starts beside it
    assert allowed(1, 0.5) == pytest.approx(0.9 * 12)  # Ray may give the other half to another trial
    assert allowed(1, 4.0) == allowed(1, 1.0)  # several GPUs are no larger GPU
    pretend_gpu["fraction"] = 0.25
    assert allowed(1, 1.0) == pytest.approx(0.9 * 6)


def test_memory_that_runs_out_on_a_gpu_is_an_answer(pretend_gpu):
    def backward(num_images, max_prompts):
        if max_prompts > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pretend_gpu["peak"] = (num_images + max_prompts) * GB

    assert forward_sizes.peak_on_gpu(backward, 2, 4) == 6 * GB
    assert forward_sizes.peak_on_gpu(backward, 2, 8) == float("inf")

    def broken(num_images, max_prompts):
        raise RuntimeError("shape")

    with pytest.raises(RuntimeError, match="shape"):  # any other error is not about memory
        forward_sizes.peak_on_gpu(broken, 1, 1)


def test_a_gpu_is_asked_for_what_is_auto(make_config, pretend_gpu, monkeypatch):
    # Six images a step, each with some queries; the GPU is a stand-in that remembers what it was asked.
    trainer = make_trainer(make_config())
    asked = {}

    def fits(backward, images, prompts, allowed):
        asked.update(images=images, prompts=prompts, queries=backward.num_queries)
        return images[-1], prompts[-1]

    monkeypatch.setattr(fit_batch, "_fitting_on_gpu", fits)
    monkeypatch.setattr(fit_batch, "_workers_on", lambda device: 1)
    runner = replace(trainer.runner, device=torch.device("cuda"))

    def resolve(**changes):
        config = trainer.config.changed({f"training.{name}": value for name, value in changes.items()})
        found = fit_batch.resolve_forward_size(config, trainer.task, trainer.model, runner, trainer.data, 6).training
        return found.batch_size, found.max_prompts_per_forward

    assert resolve(batch_size=2, max_prompts_per_forward="auto") == (2, 2 * asked["queries"])
    assert asked["images"] == [2]
    assert resolve(batch_size=9, max_prompts_per_forward="auto")[0] == 9  # as written, though a step has only 6
    assert asked["images"] == [6]
    assert resolve(batch_size="auto", max_prompts_per_forward=3) == (6, 3)
    assert (asked["images"], asked["prompts"]) == ([1, 2, 3, 6], [3])
    assert resolve(batch_size="auto", max_prompts_per_forward="auto") == (6, prompt_sizes(6 * asked["queries"])[-1])
    asked.clear()
    assert resolve(batch_size=2, max_prompts_per_forward=3) == (2, 3)
    assert not asked  # nothing is measured where nothing is auto


@dataclass
class MeasuredBackward:
    """In the place of `CostliestBackward`."""

    run: Callable[[int, int], None]
    runner: Any
    num_queries: int = 4

    def __call__(self, num_images: int, max_prompts: int) -> None:
        self.run(num_images, max_prompts)


def test_graphs_are_given_up_where_nothing_fits_beside_them(pretend_gpu):
    # A unit for each prompt at a time, and three for graphs.
    def choose(allowed):
        runner, tried = SimpleNamespace(give_up_graphs=lambda: kept.pop() if kept else False), []

        def backward(num_images, max_prompts):
            pretend_gpu["peak"] = max_prompts + (3 if kept else 0)
            tried.append((max_prompts, bool(kept)))

        kept = [True]
        backward = MeasuredBackward(backward, runner)
        return fit_batch._fitting_on_gpu(backward, [1], [1, 2, 4], allowed), tried

    assert choose(7) == ((1, 4), [(4, True)])
    assert choose(4) == ((1, 1), [(4, True), (2, True), (1, True)])  # fewer prompts rather than no graphs
    with_graphs = [(4, True), (2, True), (1, True)]
    assert choose(3.9) == ((1, 2), [*with_graphs, (4, False), (2, False)])
    assert choose(0) == ((0, 0), [*with_graphs, (4, False), (2, False), (1, False)])


# ---- in a run --------------------------------------------------------------------------------------------------------


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
        lambda runner, batch, *rest: measured.append((batch, runner.max_prompts)) or backward(runner, batch, *rest),
    )
    config = worker.config.changed(AUTO)
    found = fit_batch.resolve_forward_size(config, worker.task, worker.model, worker.runner, worker.data, 6).training
    assert (found.batch_size, found.max_prompts_per_forward) == (6, 32)
    assert {number for _, number in measured} == {32}
    measured = [batch for batch, _ in measured]
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


@pytest.mark.parametrize(
    ("others", "chosen"), [([(6, 8), (6, 8)], (6, 4)), ([(2, 8), (3, 2)], (2, 2)), ([(6, 8), (0, 0)], None)]
)
def test_all_workers_take_the_smallest(make_config, monkeypatch, others, chosen):
    # This worker could take 6 images and 4 prompts at a time; one of the others takes fewer, or nothing at all.
    worker = make_trainer(make_config())
    runner = replace(worker.runner, device=torch.device("cuda"))
    monkeypatch.setattr(fit_batch, "_workers_on", lambda device: 1)
    monkeypatch.setattr(fit_batch, "allowed_on_gpu", lambda workers, share: GB)
    monkeypatch.setattr(fit_batch, "_fitting_on_gpu", lambda *_: (6, 4))
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, *others])
    config = worker.config.changed(AUTO)
    if chosen is None:
        with pytest.raises(OutOfMemory):
            fit_batch.resolve_forward_size(config, worker.task, worker.model, runner, worker.data, 6)
        return
    found = fit_batch.resolve_forward_size(config, worker.task, worker.model, runner, worker.data, 6).training
    assert (found.batch_size, found.max_prompts_per_forward) == chosen


def test_memory_that_runs_out_in_a_run_names_what_was_chosen(make_config, monkeypatch):
    def out_of_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(worker.Trainer, "run", out_of_memory)
    config = make_config()
    Path(config.output.output_dir).mkdir()
    payload = {"config": config.model_dump(mode="json"), "use_ray": False}
    with pytest.raises(OutOfMemory, match=r"batch_size=2 and training\.max_prompts_per_forward=32 \(auto\): CUDA out"):
        worker.run_worker(payload)


# ---- the costliest image ---------------------------------------------------------------------------------------------


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
