"""The same run on any number of workers gives the same adapter, also where the number changes on the way."""

from __future__ import annotations

import pytest
import torch

from sam3lora.config import Config
from sam3lora.training.launch import train

from .run_folder import adapter_of, lines_of
from .worker_of_run import train_on

# What is random for each image must not depend on the worker that has it.
RANDOM = ("data.augmentation=sam3", "data.horizontal_flip=0.5", "training.lr_scheduler=constant")


def distance(run: Config, other: Config) -> float:
    """The L2 norm of the difference of the adapters' B matrices, which begin at zero, relative to their norm."""
    ours, theirs = (
        torch.cat([value.flatten() for name, value in sorted(adapter_of(of).items()) if ".lora_B." in name])
        for of in (run, other)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


def losses_of(run: Config) -> list[float]:
    return [line["loss"] for line in lines_of(run, "step")]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_images_of_a_step(make_config, tmp_path, world_size):
    # Five images a step: shares of 3 and 2, or of 2, 1, 1 and 1, against one worker with forwards of 2, 2 and 1.
    common = (*RANDOM, "training.num_epochs=1", "evaluation.base_loss=false")
    alone, together = (make_config(*common, images_per_step=5, output=name) for name in ("alone", "together"))
    train(alone)
    train_on(together, world_size, tmp_path / "scratch")
    assert len(losses_of(alone)) == 2
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)
    # Only the order of sums differs.
    assert distance(together, alone) < 1e-5


def test_a_resumed_run_keeps_the_step_it_began_with(make_config):
    # Begun with 4 images a step, as by two workers with 2 images each, and continued by one worker that takes 2.
    steady = (*RANDOM, "training.warmup_steps=0")
    train(make_config(*steady, max_steps=2, images_per_step=4))
    resumed, straight = make_config(*steady), make_config(*steady, images_per_step=4, output="straight")
    train(resumed, resume=True)
    train(straight)
    assert len(losses_of(straight)) == 4
    assert losses_of(resumed) == pytest.approx(losses_of(straight), rel=1e-6)
    assert distance(resumed, straight) < 1e-6


@pytest.mark.slow
def test_a_run_keeps_its_step_when_the_number_of_workers_changes(make_config, tmp_path):
    # Begun by four workers with one image each, and continued by two.
    steady = (*RANDOM, "training.warmup_steps=0", "training.batch_size=1")
    train_on(make_config(*steady, max_steps=2), 4, tmp_path / "four")
    resumed, alone = make_config(*steady), make_config(*steady, images_per_step=4, output="alone")
    train_on(resumed, 2, tmp_path / "two")
    train(alone)
    assert len(losses_of(alone)) == 4
    assert losses_of(resumed) == pytest.approx(losses_of(alone), rel=1e-5)
    assert distance(resumed, alone) < 1e-5
