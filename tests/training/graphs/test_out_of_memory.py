"""Memory that runs out beside graphs: the same numbers without them, and none is left."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from jobs.bench.recorded_graphs import RecordingCapturer
from sam3lora.errors import OutOfMemory
from sam3lora.losses import Criterion
from sam3lora.training import setup
from sam3lora.training.costliest_batch import CostliestPrompts
from sam3lora.training.graphs.gradient_graphs import GradientGraphs
from sam3lora.training.graphs.graphed_sam3 import GraphedCosts, GraphedSam3
from sam3lora.training.trainer import Trainer
from sam3lora.training.worker import run_worker

from ..two_workers import make_trainer, recorded_step


class WatchedCapturer(RecordingCapturer):
    """Knows which graphs still take memory."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: WeakSet[Any] = WeakSet()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(function)
        self._kept.add(replay)
        return replay

    @property
    def num_kept(self) -> int:
        gc.collect()
        return len(self._kept)


@pytest.fixture
def capturer() -> WatchedCapturer:
    return WatchedCapturer()


@pytest.fixture(autouse=True)
def _with_graphs(monkeypatch, capturer) -> None:
    def make_stages(sam3, checkpointing, config, device):
        criterion, graphs = Criterion(config.training.loss, touch_unused=False), GradientGraphs(lambda: capturer)
        criterion.tables = GraphedCosts(criterion.tables, graphs)
        return GraphedSam3(sam3, graphs=graphs, checkpointing=checkpointing), criterion

    monkeypatch.setattr(setup, "make_stages", make_stages)


@pytest.fixture
def trainer(make_config) -> Trainer:
    """A worker whose steps have two chunks of prompts."""
    trainer = make_trainer(make_config())
    batch = next(trainer.batches.training_batches(0, 0))
    trainer.runner.max_prompts = -(-batch.num_queries // 2)
    return trainer


@pytest.fixture
def fill_memory(monkeypatch, capturer) -> Callable[[], None]:
    """From its call on there is no room beside graphs for the loss, which is no graph, of every other chunk."""

    def fill() -> None:
        compute, numbers = Criterion.__call__, count(1)

        def compute_where_there_is_room(*args: Any) -> Any:
            if next(numbers) % 2 == 0 and capturer.num_kept:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(*args)

        monkeypatch.setattr(Criterion, "__call__", compute_where_there_is_room)

    return fill


def test_a_step_is_done_again_without_graphs(trainer, capturer, fill_memory):
    plain, _ = recorded_step(trainer), recorded_step(trainer)
    assert capturer.num_kept > 4
    fill_memory()
    repeated = recorded_step(trainer)  # the first chunk had added its gradients
    assert capturer.num_kept == 0
    for name, expected in plain.gradients.items():
        torch.testing.assert_close(repeated.gradients[name], expected, rtol=1e-5, atol=1e-6)
    assert repeated.terms == pytest.approx(plain.terms, rel=1e-5)
    counts = capturer.num_captures, capturer.num_replays
    recorded_step(trainer)  # the shapes come for the second time
    assert (capturer.num_captures, capturer.num_replays) == counts


@pytest.mark.slow
def test_the_validation_loss_is_measured_again_without_graphs(trainer, capturer, fill_memory):
    losses = [trainer.validator.loss_terms().loss() for _ in range(2)]
    assert capturer.num_kept > 2
    fill_memory()
    assert trainer.validator.loss_terms().loss() == pytest.approx(losses[0], rel=1e-6)
    assert capturer.num_kept == 0


def test_what_does_not_fit_without_graphs_either_is_told(trainer, monkeypatch):
    def compute(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Criterion, "__call__", compute)
    with pytest.raises(torch.OutOfMemoryError):
        recorded_step(trainer)


def test_a_trial_that_runs_out_of_memory_leaves_no_graph(trainer, capturer, fill_memory):
    backward = CostliestPrompts(trainer.model, trainer.runner, trainer.data, model_dropout=False)
    fill_memory()
    with pytest.raises(torch.OutOfMemoryError):
        backward(2, trainer.runner.max_prompts)
    assert capturer.num_captures > 0
    assert capturer.num_kept == 0


def test_a_run_that_ends_out_of_memory_leaves_no_graph(make_config, monkeypatch, capturer):
    step, numbers = torch.optim.AdamW.step, count(1)

    def step_twice(*args: Any) -> Any:
        if next(numbers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_twice)
    config = make_config()
    Path(config.output.output_dir).mkdir()
    with pytest.raises(OutOfMemory) as told:
        run_worker({"config": config.model_dump(mode="json"), "use_ray": False})
    assert capturer.num_captures > 0
    assert capturer.num_kept == 0
    assert told.value.__cause__ is not None  # which holds all that the run had made
