"""Dense runs: the same whatever interrupts or divides them, and folders that give back what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from peft import PeftModel
from transformers import Sam3Model

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import load_adapter
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.dense.folder import load_dense
from sam3lora.model.loading import load_base
from sam3lora.training import trainer
from sam3lora.training.launch import train

from ..run_folder import folder_of, lines_of, passes_of
from .dense_runs import ADAPTERS, assert_same_weights, logged


def slow(value: str) -> ParameterSet:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("adapter", ["lora", slow("bottleneck"), slow("none")])
def test_resume_equals_the_straight_run(make, adapter, monkeypatch):
    flips = ("data.horizontal_flip=0.5", "data.vertical_flip=0.5") if adapter != "none" else ()
    straight = make(adapter, *flips, output="straight")
    train(straight)
    config = make(adapter, *flips, "training.save_steps=1")
    step = trainer.optimizer_step

    def killed_before_step_5(run, group):
        if run.state.step == 4:
            raise KeyboardInterrupt
        return step(run, group)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", killed_before_step_5)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    for kind in ("step", "epoch"):
        assert logged(config, kind) == logged(straight, kind)
    assert_same_weights(config, straight, rtol=0, atol=0)


def test_a_step_does_not_depend_on_how_it_is_divided(make):
    # Dropout draws other numbers for other batches.
    whole = make("lora", "lora.dropout=0", "training.batch_size=3", output="whole")
    parts = make("lora", "lora.dropout=0", "training.batch_size=1", "training.gradient_accumulation_steps=3")
    for config in (whole, parts):
        train(config)
    for name in ("loss", "grad_norm"):
        of_whole, of_parts = ([line[name] for line in lines_of(config, "step")] for config in (whole, parts))
        assert of_parts == pytest.approx(of_whole, rel=1e-3)


def test_images_of_frozen_layers_are_encoded_once_with_the_same_result(make):
    plain, cached = make("none", "training.feature_cache=false", output="plain"), make("none")
    for config in (plain, cached):
        train(config)
    assert passes_of(cached)[0] == 6 + 3
    assert passes_of(plain)[0] > 2 * passes_of(cached)[0]
    for kind, name in (("step", "loss"), ("epoch", "valid_loss"), ("epoch", "mean_iou")):
        ours, theirs = ([line[name] for line in logged(run, kind)] for run in (cached, plain))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("layers", ["global", slow("last"), slow("[0]")])
def test_what_the_cache_keeps_with_adapted_last_layers(make, layers):
    options = (f"dense.layers={layers}", "lora.vision_last_layers=1", "lora.dropout=0")
    plain, cached = make("lora", *options, "training.feature_cache=false", output="plain"), make("lora", *options)
    for config in (plain, cached):
        train(config)
    assert passes_of(cached)[0] == 6 + 3
    ours, theirs = ([line["loss"] for line in lines_of(run, "step")] for run in (cached, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_folder_gives_back_what_was_trained(make, adapter, lively_base, monkeypatch):
    models, save = [], trainer.Trainer.save

    def saving(run):
        models.append(run.model)
        save(run)

    monkeypatch.setattr(trainer.Trainer, "save", saving)
    config = make(adapter)
    train(config)
    base = load_base(str(lively_base))
    pixels = torch.rand(2, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0))
    model, metadata = load_dense(base, folder_of(config) / "last")
    with torch.no_grad():
        expected, found = models[-1].eval()(pixels), model(pixels)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert metadata.task == "dense"
    assert metadata.dense["classes"] == list(model.settings.classes)
    if adapter == "lora":  # the half that is LoRA is a plain PEFT adapter
        stock = PeftModel.from_pretrained(Sam3Model.from_pretrained(lively_base), folder_of(config) / "last")
        assert sum(".lora_B." in name for name, _ in stock.named_parameters()) > 0


def test_folders_of_another_task_or_with_something_missing(make, lively_base, tmp_path):
    config = make("lora", "training.max_steps=1", "evaluation.every_epochs=0")
    train(config)
    folder = folder_of(config) / "last"
    base = load_base(str(lively_base))
    for use in (lambda: load_adapter(base.model, folder), lambda: read_adapter_weights(folder, base.model)):
        with pytest.raises(UserError, match="predict_dense"):
            use()

    def broken(name: str, change: Callable[[Path], object]) -> Path:
        copied = tmp_path / name
        shutil.copytree(folder, copied)
        change(copied)
        return copied

    def replaced(old: str, new: str) -> Callable[[Path], object]:
        return lambda copied: _replace(copied / "sam3lora.json", old, new)

    for name, change, words in (
        ("head", lambda copied: (copied / "dense_head.safetensors").unlink(), "lacks dense_head"),
        ("bytes", lambda copied: (copied / "dense_head.safetensors").write_bytes(b"\0" * 64), "damaged"),
        ("settings", lambda copied: (copied / "sam3lora.json").unlink(), "not of task dense"),
        ("width", replaced('"width": 32', '"width": 64'), "shape"),
        ("size", replaced('"resolution": 112', '"resolution": 224'), "224"),
        ("base", replaced('"base_fingerprint": "', '"base_fingerprint": "0'), "was trained on the base"),
    ):
        with pytest.raises(UserError, match=words):
            load_dense(load_base(str(lively_base)), broken(name, change))


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
