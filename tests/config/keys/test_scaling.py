"""Keys of `scaling`: what Ray is asked for. Runs on a real Ray are in `tests/train`."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from .conftest import acts

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@pytest.fixture
def ask(settings, monkeypatch):
    """`ask("scaling.num_workers=3")` -> what `train` asks of a cluster with two GPUs."""
    import ray

    from sam3lora import cluster
    from sam3lora.training import ray_trainer
    from sam3lora.training.launch import train

    asked = SimpleNamespace(init=None, trainer=None, start_timeout=None)

    class Trainer:
        def __init__(self, function, **options):
            asked.trainer = SimpleNamespace(**options)

        def fit(self):
            asked.start_timeout = os.environ.get(START_TIMEOUT)
            return SimpleNamespace(return_value={"step": 0, "best_loss": None})

    for name in ("RAY_ADDRESS", START_TIMEOUT):
        monkeypatch.setenv(name, "")  # so that what `train` sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: setattr(asked, "init", options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    resources = {"CPU": 64.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, name, lambda: resources)
    monkeypatch.setattr(cluster, "_join", lambda address, quiet: ray.init(address=address, **quiet))
    for name in ("LocalTrainer", "PlainTrainer"):
        monkeypatch.setattr(ray_trainer, name, Trainer)

    def make(*overrides):
        asked.init = asked.trainer = None
        train(settings("scaling.num_workers=1", *overrides))
        return SimpleNamespace(**vars(asked))

    return make


@acts("scaling.num_workers")
def test_num_workers_train_side_by_side(ask, run):
    assert ask("scaling.num_workers=2").trainer.scaling_config.num_workers == 2
    assert ask("scaling.num_workers=[1, 4]").trainer.scaling_config.num_workers == (1, 4)
    # 0 trains in this process and asks Ray for nothing.
    assert ask("scaling.num_workers=0").trainer is None


@acts("scaling.use_gpu")
@pytest.mark.parametrize(("value", "use_gpu", "backend"), [("auto", True, "nccl"), ("false", False, "gloo")])
def test_use_gpu_gives_each_worker_one(value, use_gpu, backend, ask):
    trainer = ask(f"scaling.use_gpu={value}").trainer
    assert trainer.scaling_config.use_gpu is use_gpu
    assert backend in trainer.backend_config.backend


@acts("scaling.resources_per_worker")
def test_resources_per_worker_are_reserved(ask):
    gpu = "scaling.use_gpu=false"
    plain, large = ask(gpu), ask(gpu, "scaling.resources_per_worker={CPU: 6}")
    assert plain.trainer.scaling_config.resources_per_worker["CPU"] < 6
    assert large.trainer.scaling_config.resources_per_worker == {"CPU": 6}
    # A local Ray is made large enough for them.
    assert large.init["num_cpus"] == 6


@acts("scaling.max_failures")
def test_max_failures_are_restarts(ask):
    for count in (0, 7):
        trainer = ask(f"scaling.max_failures={count}").trainer
        assert trainer.run_config.failure_config.max_failures == count


@acts("scaling.address")
def test_address_is_the_cluster_to_join(ask):
    assert ask().init["address"] == "local"
    assert ask("scaling.address=10.0.0.1:6379").init["address"] == "10.0.0.1:6379"


@acts("scaling.placement_strategy")
def test_placement_strategy_is_the_spread_of_workers(ask):
    for strategy in ("PACK", "STRICT_SPREAD"):
        trainer = ask(f"scaling.placement_strategy={strategy}").trainer
        assert trainer.scaling_config.placement_strategy == strategy


@acts("scaling.worker_start_timeout_s")
def test_worker_start_timeout_holds_for_its_run(ask):
    # Ray Train reads it from the environment; the second run of a process must not get the first one's.
    assert float(ask("scaling.worker_start_timeout_s=5").start_timeout) == 5
    assert float(ask("scaling.worker_start_timeout_s=90").start_timeout) == 90
