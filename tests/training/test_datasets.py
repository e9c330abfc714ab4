"""Batches of a worker come as the plan says, prepared on a thread."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
import torch

from sam3lora.data.pipeline import iterate_batches
from sam3lora.data.plan import plan_run
from sam3lora.errors import UserError
from sam3lora.training.datasets import BatchSource, load_run_data
from sam3lora.training.metrics_log import describe_line
from sam3lora.training.setup import choose_device


@pytest.fixture
def config(make_config):
    return make_config(batch_size=2, num_epochs=2)


@pytest.mark.parametrize("start", [(0, 0), (0, 2), (1, 1)])
def test_batches_are_those_of_the_plan_from_any_step_on(config, start):
    data = load_run_data(config, 112)
    seen = []

    def load_ahead(batch):
        seen.append((batch.image_ids.tolist(), threading.current_thread().name))

    batches = list(
        BatchSource(data, config, images_per_step=2, use_ray=False, load_ahead=load_ahead).training_batches(*start)
    )
    epoch, step = start
    plans = plan_run(len(data.train), images_per_step=2, num_epochs=2, seed=config.training.seed,
                     start_epoch=epoch, start_step=step)  # fmt: skip
    expected = list(iterate_batches(data.train.table, plans, data.train_settings))
    assert [(b.epoch, b.step) for b in batches] == [(b.epoch, b.step) for b in expected]
    for batch, other in zip(batches, expected, strict=True):
        for name, value in vars(other).items():
            found = getattr(batch, name)
            assert np.array_equal(found, value), name
    assert seen == [(batch.image_ids.tolist(), "sam3lora-prefetch") for batch in batches]


@pytest.mark.parametrize("num_samples", [None, 1, 2, 50])
def test_a_validation_loss_is_of_the_first_images(config, num_samples):
    config = config.changed({"evaluation.num_samples": num_samples})
    data = load_run_data(config, 112)
    source = BatchSource(data, config, images_per_step=2, use_ray=False)
    seen = [id for batch in source.validation_batches() for id in batch.image_ids.tolist()]
    assert seen == data.valid.table.column("image_id").to_pylist()[:num_samples]
    assert source.num_validated == len(seen) == min(num_samples or 3, 3)


def test_batches_for_a_gpu_are_pinned_by_its_own_thread(config, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    data, gpu, ahead = load_run_data(config, 112), torch.device("cuda:1"), []
    source = BatchSource(data, config, images_per_step=2, use_ray=False, device=gpu, load_ahead=ahead.append)
    batches = list(source.training_batches(1, 0))
    # what is read ahead is held as long as the very batch that is used
    assert [id(batch) for batch in ahead] == [id(batch) for batch in batches]
    assert chosen == [(torch.device("cuda:1"), "sam3lora-prefetch")] * len(batches)
    chosen.clear()
    next(BatchSource(data, config, images_per_step=2, use_ray=False, device=torch.device("cpu")).training_batches(1, 0))
    assert chosen == []


def test_a_gpu_without_ray_has_a_number(config, monkeypatch):
    # torch.cuda.set_device takes no other
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    config = config.changed({"scaling.use_gpu": "auto"})
    assert choose_device(config, use_ray=False) == torch.device("cuda", 2)


def test_names_of_complete_categories_are_those_of_the_data(make_config):
    with pytest.raises(UserError, match=r"data\.exhaustive names 'gaer'.*it has .*gear"):
        load_run_data(make_config("data.exhaustive=[gaer]"), 112)
    data = load_run_data(make_config("data.exhaustive=[Gear]"), 112)
    assert data.train_settings.exhaustive == ("Gear",)
    # a word cannot be in no image and have objects without a label
    with pytest.raises(UserError, match="no image shows 'Bolt'"):
        load_run_data(make_config("data.exhaustive=[gear]", "data.negative_prompts=[Bolt]"), 112)


def test_low_masks_follow_the_patches_of_the_base(make_config):
    config = make_config("training.loss.mask_resolution=low")
    assert [load_run_data(config, 112, patch_size).train_settings.mask_size for patch_size in (14, 16)] == [32, 28]


def test_layouts_of_other_tools_and_a_missing_validation_split(scenes, make_config, tmp_path):
    shutil.copytree(scenes / "train", tmp_path / "images" / "train2017")
    (tmp_path / "annotations").mkdir()
    labels = tmp_path / "images" / "train2017" / "_annotations.coco.json"
    labels.rename(tmp_path / "annotations" / "instances_train2017.json")
    config = make_config(f"training.data_dir={tmp_path}")
    data = load_run_data(config, 112)
    assert len(data.train) == len(load_run_data(make_config(), 112).train)
    assert data.valid is None
    # the start of the run says where validation images were looked for
    start = {"kind": "start", "device": "cpu", "num_workers": 1}
    line = describe_line(start | data.summary() | {"no_valid": data.no_valid})
    assert all(folder in line for folder in ("0 validation images", "valid/", "val/", "validation/"))
    shutil.copytree(scenes / "valid", tmp_path / "val")
    data = load_run_data(config, 112)
    assert len(data.valid) == len(load_run_data(make_config(), 112).valid)
    assert data.no_valid is None
