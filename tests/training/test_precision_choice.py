"""`training.mixed_precision` on GPUs with and without bfloat16."""

from __future__ import annotations

import logging

import pytest
import torch

from sam3lora.config import load_config, preset_names
from sam3lora.errors import UserError
from sam3lora.training import setup

from ..engine.test_device import pretend_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def configured(*overrides: str):
    return load_config({"lora": {"apply_to_mask_decoder": True}}, overrides)


def test_auto_is_bf16_on_gpus_that_have_it_and_on_a_cpu(monkeypatch):
    pretend_gpu(monkeypatch, bfloat16=True)
    assert setup.computes_in_bf16(configured(), GPU)
    assert setup.computes_in_bf16(configured(), torch.device("cpu"))


def test_auto_falls_back_to_float32_and_says_so(monkeypatch, on_gpu, caplog):
    pretend_gpu(monkeypatch, bfloat16=False)
    assert setup.choose_device(configured(), use_ray=False) == GPU
    with caplog.at_level(logging.WARNING):
        assert not setup.computes_in_bf16(configured(), GPU)
    assert "Tesla T4" in caplog.text


def test_one_gpu_without_it_among_the_workers_decides_for_all(monkeypatch):
    pretend_gpu(monkeypatch, bfloat16=True)
    monkeypatch.setattr(setup, "gather_objects", lambda own: [own, "the GPU Tesla T4"])
    assert not setup.computes_in_bf16(configured(), GPU)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("training.mixed_precision=bf16", "training.mixed_precision is bf16"),
        ("model.dtype=bfloat16", "model.dtype is bfloat16"),
        ("model.quantization=nf4", "model.quantization is nf4"),
    ],
)
def test_what_is_written_and_needs_it_is_refused_before_anything_is_loaded(written, named, monkeypatch, on_gpu):
    pretend_gpu(monkeypatch, bfloat16=False)
    with pytest.raises(UserError, match=rf"{named}.*Tesla T4.*mixed_precision=no"):
        setup.choose_device(configured(written), use_ray=False)
    pretend_gpu(monkeypatch, bfloat16=True)
    assert setup.choose_device(configured(written), use_ray=False) == GPU


@pytest.mark.parametrize("name", preset_names())
def test_presets_run_on_any_gpu(name, monkeypatch):
    pretend_gpu(monkeypatch, bfloat16=False)
    assert not setup.computes_in_bf16(load_config(name), GPU)
