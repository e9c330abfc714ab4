"""From overrides, as a user writes them, to a configuration, a training worker or a whole short run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from sam3lora.config import Config, load_config

from .coco_folder import write_data

if TYPE_CHECKING:
    from sam3lora.data.batch import Batch
    from sam3lora.training.launch import TrainResult
    from sam3lora.training.trainer import Trainer

BASE_SETTINGS: dict[str, Any] = {
    "lora": {
        "rank": 2,
        "alpha": 4,
        "dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "apply_to_detr_decoder": True,
    },
    "training": {
        "batch_size": 2,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "warmup_steps": 0,
        "lr_scheduler": "constant",
        "logging_steps": 1,
    },
    "scaling": {"num_workers": 0, "use_gpu": False},
    "logging": {"plots": False, "progress": "off"},
}


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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two validation images; read only."""
    return write_data(tmp_path_factory.mktemp("keys") / "data")


@pytest.fixture(scope="package")
def settings(small_base: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """`settings("lora.rank=4")` -> the configuration of a two-step run without Ray, each with a folder of its own."""

    def make(*overrides: str) -> Config:
        raw = copy.deepcopy(BASE_SETTINGS)
        raw["model"] = {"name": str(small_base)}
        raw["training"]["data_dir"] = str(data_dir)
        raw["output"] = {"output_dir": str(tmp_path_factory.mktemp("run"))}
        return load_config(raw, overrides)

    return make


@pytest.fixture(scope="package")
def build(settings: Callable[..., Config]) -> Callable[..., Trainer]:
    """`build("lora.rank=4")` -> a new trainer that is ready for its first step."""
    from sam3lora.training.trainer import Trainer

    def make(*overrides: str) -> Trainer:
        config = settings(*overrides)
        output_dir = Path(config.output.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        return Trainer(config, output_dir, use_ray=False)

    return make


@pytest.fixture(scope="package")
def shared(build: Callable[..., Trainer], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """As `build`, but the same overrides give the same worker: for tests that neither train nor change it."""
    workers: dict[tuple[str, ...], Trainer] = {}
    cache = f"training.cache_dir={tmp_path_factory.mktemp('cache')}"

    def make(*overrides: str) -> Trainer:
        if overrides not in workers:
            workers[overrides] = build(cache, *overrides)
        return workers[overrides]

    return make


@pytest.fixture(scope="package")
def run(settings: Callable[..., Config]) -> Callable[..., TrainResult]:
    """`run("training.num_epochs=2")` -> the result of a whole training in this process."""
    from sam3lora.training.launch import train

    return lambda *overrides: train(settings(*overrides))


@pytest.fixture(scope="package")
def plain_run(run: Callable[..., TrainResult]) -> TrainResult:
    """A run with the settings above: one epoch of two steps."""
    return run()


@pytest.fixture(scope="package")
def changed_run(run: Callable[..., TrainResult]) -> TrainResult:
    """A run with many keys changed at once; each test looks at what one of them does."""
    return run(
        "training.num_epochs=2",
        "training.logging_steps=2",
        "training.eval_steps=1",
        "training.warmup_steps=2",
        "evaluation.base_loss=false",
        "logging.tensorboard=true",
        "logging.plots=true",
    )


def first_batch(worker: Trainer) -> Batch:
    return next(worker.batches.training_batches(0, 0))


def batches_of_an_epoch(worker: Trainer) -> list[Batch]:
    size = worker.batches.steps_per_epoch * worker.batches.forwards_per_step
    return list(islice(worker.batches.training_batches(0, 0), size))


def take_step(worker: Trainer) -> tuple[dict[str, float], float]:
    """One update of the adapter: loss terms, and the norm of the gradient before clipping."""
    from sam3lora.training.update import optimizer_step

    group = list(islice(worker.batches.training_batches(0, 0), worker.batches.forwards_per_step))
    terms, _, norm = optimizer_step(worker, group)
    return terms, norm


def loss_terms(worker: Trainer, batch: Batch | None = None) -> dict[str, float]:
    """Unweighted terms of a batch (the first one) without gradients or dropout."""
    from sam3lora.training.step import StepCounts

    batch = batch or first_batch(worker)
    worker.model.eval()
    terms = worker.runner.evaluate(batch, StepCounts.of([batch]).normalizer())
    return {name: value.item() for name, value in terms.items()}
