"""Whole runs in this process: what they leave, resume, stop at, and refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Sam3Model

from sam3lora.config import Config, load_config
from sam3lora.errors import RunFailed, UserError
from sam3lora.losses import Criterion
from sam3lora.training import trainer, update
from sam3lora.training.launch import train
from sam3lora.training.step import LossRunner
from sam3lora.training.trainer import Trainer
from sam3lora.training.validator import Validator

from .changed_scenes import rewrite, rewritten, with_broken_images, without_objects
from .run_folder import adapter_of, checkpoints_of, folder_of, lines_of, without_measures

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "sam3lora.json", "README.md"}


def test_run_folder(make_config):
    # Exactly the promised files; both adapters load in plain PEFT; the configuration reads back as it was.
    config = make_config("logging.plots=true", save_total_limit=1)
    result = train(config)
    folder = Path(config.output.output_dir)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    checkpoint = {f"checkpoints/step_00000006/{name}.safetensors" for name in ("adapter", "optimizer")}
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "plots/loss.png",
        "plots/terms.png",
        "checkpoints/step_00000006/state.json",
        *checkpoint,
        *(f"{name}/{file}" for name in ("best", "last") for file in ADAPTER_FILES),
    }
    saved = load_config(folder / "config.yaml")
    assert saved == config
    base = Sam3Model.from_pretrained(config.model.name)
    model = PeftModel.from_pretrained(base, result.best_adapter)
    assert any(parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name)

    assert (result.output_dir, result.steps) == (folder, 6)
    assert [(line["epoch"], line["step"]) for line in result.history] == [(1, 3), (2, 6)]
    assert result.best_loss == pytest.approx(min(line["valid_loss"] for line in result.history), rel=1e-6)
    metadata = json.loads((folder / "last" / "sam3lora.json").read_text())
    assert metadata["prompts"] == ["gear", "arrow", "bolt", "capsule"]
    assert metadata["metrics"] == {"step": 6, "epoch": 2}
    assert metadata["geometry_cls"] is True


def test_metrics_say_what_happened(make_config):
    # A line a step with all terms, the rate of the schedule and the speed; `loss` is the weighted sum of the terms.
    config = make_config()
    train(config)
    steps = lines_of(config, "step")
    assert [(line["step"], line["epoch"]) for line in steps] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [line["lr"] for line in steps[:3]] == pytest.approx([1e-3, 2e-3, 2e-3])
    factors = config.training.loss.by_term()
    for line in steps:
        assert line["terms"].keys() == factors.keys()
        assert line["loss"] == pytest.approx(sum(factors[n] * v for n, v in line["terms"].items()), rel=1e-5)
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
    [start] = lines_of(config, "start")
    assert (start["num_train_images"], start["num_valid_images"], start["num_workers"]) == (6, 3, 1)


def test_validation_loss_is_the_training_loss(make_config):
    # On the same images with the same prompts and weights that do not move, the two numbers and all terms agree,
    # although training ran in batches of 4 with two at a time and validation in twos.
    config = make_config(
        "data.valid_split=train", learning_rate=1e-12, num_negatives=-1, num_epochs=1, batch_size=3,
        max_prompts_per_forward=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    train(config)
    [line] = lines_of(config, "epoch")
    assert line["valid_loss"] == pytest.approx(line["train_loss"], rel=1e-5)
    assert line["valid_terms"] == pytest.approx(line["train_terms"], rel=1e-5, abs=1e-7)


def test_overfits_four_images(make_config, scenes, tmp_path):
    # Every component adapted, four images, no negatives to tell apart: the loss falls clearly below where it began.
    data = rewritten(scenes, tmp_path / "four", lambda content: content.update(images=content["images"][:4]), "train")
    shutil.rmtree(data / "valid")
    config = make_config(data_dir=str(data), batch_size=4, num_epochs=12, learning_rate=1e-2, save_steps=1000)
    history = train(config).history
    first, last = history[0], history[-1]
    assert last["train_loss"] < 0.7 * first["train_loss"]
    for term in ("loss_bbox", "loss_mask", "presence_loss"):
        assert last["train_terms"][term] < 0.95 * first["train_terms"][term], term
    # Without a validation split the training loss chooses the best adapter.
    assert all(line["valid_loss"] is None for line in history)
    assert lines_of(config, "end")[0]["best_step"] > 5


# ---- resume ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The process is killed."""


def stop_before_step(monkeypatch, step: int) -> None:
    original = trainer.optimizer_step

    def stopping(run, group):
        if run.state.step + 1 == step:
            raise Stopped
        return original(run, group)

    monkeypatch.setattr(trainer, "optimizer_step", stopping)


def assert_same_run(resumed: Config, straight: Config) -> None:
    """Losses, rates and weights agree, and every step is logged once; times and counts are of each attempt."""
    for kind in ("step", "epoch"):
        ours, theirs = lines_of(resumed, kind), lines_of(straight, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key in without_measures(other).keys() - {"kind"}:
                assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=1e-9), (kind, mine["step"], key)
    for name in ("best", "last"):
        ours, theirs = adapter_of(resumed, name), adapter_of(straight, name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-8)


# Dropout, augmentation and sampled negatives: whatever is random must come back too.
RANDOM = ("lora.dropout=0.3", "data.augmentation=sam3", "data.horizontal_flip=0.5", "lora.apply_to_text_encoder=true")


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """An undisturbed run of 3 epochs of 3 steps with everything random switched on, made once."""
    made: list[Config] = []

    def run(make_config) -> Config:
        if not made:
            folder = tmp_path_factory.mktemp("straight") / "run"
            made.append(make_config(*RANDOM, f"output.output_dir={folder}", num_epochs=3))
            train(made[0])
        return made[0]

    return run


@pytest.mark.parametrize(
    ("stop", "save_steps", "left"),
    [
        pytest.param(7, None, ["step_00000003", "step_00000006"], id="after an epoch", marks=pytest.mark.slow),
        pytest.param(6, 2, ["step_00000002", "step_00000004"], id="inside an epoch"),
    ],
)
def test_resume_equals_the_straight_run(make_config, straight_run, monkeypatch, capsys, stop, save_steps, left):
    # Killed before a step, and resumed from the last checkpoint: the same losses, rates, means and weights.
    overrides = (*RANDOM, "logging.progress=lines")
    config = make_config(*overrides, num_epochs=3, save_steps=save_steps)
    with monkeypatch.context() as patched:
        stop_before_step(patched, stop)
        with pytest.raises(Stopped):
            train(config)
    assert checkpoints_of(config) == left
    capsys.readouterr()
    train(config, resume=True)
    assert_same_run(config, straight_run(make_config))
    # The display of the second attempt begins where the checkpoint was.
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == [f"{step}/9" for step in range(int(left[-1][-1]) + 1, 10)]


def test_max_steps_then_more(make_config):
    # A run may be ended early on purpose and go on later; with a constant rate nothing tells the two apart.
    constant = ("training.lr_scheduler=constant", "training.save_steps=1", "training.warmup_steps=0")
    short = make_config(*constant, max_steps=2)
    assert train(short).steps == 2
    longer = make_config(*constant)
    train(longer, resume=True)
    straight = make_config(*constant, output="straight")
    train(straight)
    assert [line["loss"] for line in lines_of(longer, "step")] == pytest.approx(
        [line["loss"] for line in lines_of(straight, "step")], rel=1e-6
    )
    ours, theirs = adapter_of(longer), adapter_of(straight)
    assert all(torch.allclose(ours[key], value, rtol=1e-6, atol=1e-8) for key, value in theirs.items())


@pytest.mark.parametrize("keeps", [True, False])
def test_resume_with_another_batch_size_covers_the_epoch(make_config, monkeypatch, keeps):
    # Stopped after 2 steps of 2 of the 6 images; going on with single images leaves the 2 others of that epoch.
    config = make_config(save_steps=1, num_epochs=1)
    seen = []
    original = trainer.optimizer_step

    def watched(run, group):
        result = original(run, group)
        seen.extend(number for batch in group for number in batch.image_ids.tolist())
        return result

    monkeypatch.setattr(trainer, "optimizer_step", watched)
    with monkeypatch.context() as patched:
        stop_before_step(patched, 3)
        with pytest.raises(Stopped):
            train(config)
    # A step keeps its images, whatever a forward takes; asked for, it takes others from here on.
    others, step = ({"batch_size": 1}, 3) if keeps else ({"batch_size": 2, "images_per_step": 1}, 4)
    result = train(make_config(save_steps=1, num_epochs=1, **others), resume=True)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert result.steps == step


def test_a_folder_with_a_run_is_refused(make_config):
    # Without --resume nothing is touched.
    config = make_config(num_epochs=1)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output.output_dir).rglob("*")}
    with pytest.raises(UserError, match="--resume"):
        train(config)
    # Resuming under other settings neither, also not the configuration beside the results.
    with pytest.raises(UserError, match=r"lora\.rank \(was 4, is 8\)"):
        train(make_config("lora.rank=8", num_epochs=1), resume=True)
    assert {path: path.stat().st_mtime_ns for path in Path(config.output.output_dir).rglob("*")} == before
    # An adapter that no checkpoint belongs to is somebody's work, too.
    shutil.rmtree(Path(config.output.output_dir) / "checkpoints")
    with pytest.raises(UserError, match="--output-dir"):
        train(config)


def test_a_failed_start_may_be_repeated(make_config):
    # A wrong category is found after the folder was made; the corrected command works in the same place.
    with pytest.raises(UserError, match="resume"):
        train(make_config(), resume=True)
    with pytest.raises(UserError, match="gaer"):
        train(make_config("data.categories=[gaer]"))
    assert train(make_config("data.categories=[gear]", num_epochs=1)).steps == 3


def test_output_that_is_a_file(make_config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))):
        train(make_config())
    assert (tmp_path / "run").read_text() == "mine"


# ---- when to validate, save and stop ---------------------------------------------------------------------------------


def test_eval_and_save_steps(make_config):
    # Validation after every 2nd step and the last, checkpoints after every 4th and the last; an epoch's training mean
    # is written even when no validation is due.
    config = make_config(num_epochs=3, eval_steps=2, save_steps=4)
    train(config)
    found = [(line["step"], line["epoch"], line["valid_loss"] is not None) for line in lines_of(config, "epoch")]
    assert found == [
        (2, 1, True), (3, 1, False), (4, 2, True), (6, 2, True), (8, 3, True), (9, 3, True),
    ]  # fmt: skip
    assert checkpoints_of(config) == ["step_00000004", "step_00000008", "step_00000009"]


def test_training_mean_covers_the_epoch(make_config):
    # The mean written in the middle of an epoch is over its first steps, the one at its end over all of them, and the
    # next epoch begins anew.
    config = make_config(max_steps=4, eval_steps=1, num_negatives=0)
    train(config)
    steps, means = lines_of(config, "step"), lines_of(config, "epoch")
    for first in (0, 3):
        assert means[first]["train_terms"] == pytest.approx(steps[first]["terms"], rel=1e-5)
    largest, least = (choose(line["terms"]["presence_loss"] for line in steps[:3]) for choose in (max, min))
    assert least < means[2]["train_terms"]["presence_loss"] < largest


def test_early_stopping(make_config, monkeypatch):
    # Losses 5, 4, 4, 6: two validations in a row are no better than the second, so the run ends after the fourth.
    base_model = 3.0  # measured first, and no candidate for the best adapter
    losses = iter([base_model, 5.0, 4.0, 4.0, 6.0, 1.0, 1.0])
    original = Validator.loss_terms

    def scripted(run):
        terms, loss = original(run), next(losses)
        terms.loss = lambda: loss
        return terms

    monkeypatch.setattr(Validator, "loss_terms", scripted)
    config = make_config(num_epochs=6, early_stopping_patience=2)
    result = train(config)
    assert (result.steps, result.best_loss) == (12, 4.0)
    [line] = lines_of(config, "early_stop")
    assert (line["step"], line["best_step"]) == (12, 6)
    metadata = json.loads((result.best_adapter / "sam3lora.json").read_text())
    assert metadata["metrics"] == {"step": 6, "epoch": 2, "valid_loss": 4.0}
    assert checkpoints_of(config)[-1] == "step_00000012"
    # Resuming does not take it up again.
    assert train(config, resume=True).steps == 12


def test_a_run_begins_with_the_base_models_loss(make_config):
    # The base line has the terms of a validation. Resuming the finished run does nothing; with more epochs it goes on,
    # and does not measure the base again.
    config = make_config(num_epochs=1)
    result = train(config)
    [line] = lines_of(config, "base")
    assert line["step"] == 0
    assert line["valid_terms"].keys() == result.history[0]["valid_terms"].keys()
    before = adapter_of(config)
    assert train(config, resume=True).steps == 3
    assert all(torch.equal(adapter_of(config)[key], value) for key, value in before.items())
    assert len(lines_of(config, "step")) == 3
    assert train(make_config(num_epochs=2), resume=True).steps == 6
    assert len(lines_of(config, "base")) == 1
    # What the warning at the end compares with is still known.
    state = json.loads((folder_of(config) / "checkpoints" / checkpoints_of(config)[-1] / "state.json").read_text())
    assert state["state"]["base_values"] == pytest.approx({"valid_loss": line["valid_loss"]}, rel=1e-6)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def break_step(monkeypatch, step: int, how: str) -> None:
    """From an optimizer step on, the loss is NaN; or the matcher refuses costs that are not finite."""
    original = Criterion.__call__
    calls = []

    def broken(criterion, *arguments):
        if torch.is_grad_enabled():
            calls.append(None)
        output = original(criterion, *arguments)
        if torch.is_grad_enabled() and len(calls) >= step:
            if how == "matching":
                raise FloatingPointError("cost is not finite")
            output.total = output.total * torch.nan
        return output

    monkeypatch.setattr(Criterion, "__call__", broken)


@pytest.mark.parametrize("how", ["loss", "matching"])
def test_loss_that_is_not_finite(make_config, monkeypatch, how):
    # The error names step, images and prompts; the weights are those before the step; the checkpoint is intact, and
    # the run goes on from it once the cause is gone.
    config = make_config(save_steps=2, max_prompts_per_forward=100)
    models = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda trainer: models.append(trainer) or run(trainer))
    with monkeypatch.context() as patched:
        break_step(patched, 3, how)
        with pytest.raises(RuntimeError, match=r"step 3.*images \[\d, \d\].*'arrow'"):
            train(config)
    folder = Path(config.output.output_dir)
    assert checkpoints_of(config) == ["step_00000002"]
    saved = load_file(folder / "checkpoints" / "step_00000002" / "adapter.safetensors")
    state = {name.replace(".default.", "."): value for name, value in models[0].model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert train(config, resume=True).steps == 6
    assert checkpoints_of(config) == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_gradient_that_is_not_finite(make_config, monkeypatch):
    # A finite loss may have an infinite gradient: that stops before the weights, too.
    original = update.distributed.average_gradients

    def spoil(parameters, extra):
        next(p for p in parameters if p.grad is not None).grad.fill_(torch.inf)
        return original(parameters, extra)

    monkeypatch.setattr(update.distributed, "average_gradients", spoil)
    with pytest.raises(RunFailed, match=r"step 1.*gradient.*images \[\d, \d\]"):
        train(make_config())


def test_validation_loss_that_is_not_finite(make_config, monkeypatch):
    # It chooses no best adapter and ends the run.
    original = LossRunner.evaluate
    monkeypatch.setattr(
        LossRunner,
        "evaluate",
        lambda *arguments: {name: value * torch.nan for name, value in original(*arguments).items()},
    )
    config = make_config()
    with pytest.raises(RunFailed, match=r"validation .* step 3"):
        train(config)
    assert not (Path(config.output.output_dir) / "best").exists()


def test_idle_adapters_are_named(make_config):
    # With all mask terms off the mask decoder's adapter cannot learn: the run says so, and names its modules.
    off = [f"training.loss.{name}=0" for name in ("mask", "dice", "semantic", "semantic_dice")]
    config = make_config(*off, num_epochs=1)
    train(config)
    [warning] = lines_of(config, "warning")
    assert "mask_decoder.instance_projection" in warning["message"]
    assert all(name.startswith("mask_decoder.") for name in warning["modules"])


def test_no_idle_adapters_no_warning(make_config, scenes, tmp_path):
    # Also when the first steps show images without any object, which give no gradient to boxes and masks.
    data = shutil.copytree(scenes, tmp_path / "data")
    config = make_config(data_dir=str(data), batch_size=1, num_epochs=1)
    train(config)
    # The image of the first step is found by a dry run; then its objects are removed.
    first = next(Trainer(config, tmp_path, use_ray=False).batches.training_batches(0, 0)).image_ids.item()
    rewrite(data / "train", without_objects(first))
    again = make_config(data_dir=str(data), batch_size=1, num_epochs=1, output="again")
    train(again)
    assert lines_of(again, "step")[0]["terms"]["loss_bbox"] == 0
    assert lines_of(config, "warning") == lines_of(again, "warning") == []


def test_broken_images_are_left_out_and_named(make_config, scenes, tmp_path, capsys):
    # Training and validation go on without them; metrics and the display name them. A step may lose all its images.
    data = with_broken_images(scenes, tmp_path / "broken", "train/00002.jpg", "valid/00001.jpg")
    config = make_config("logging.progress=lines", data_dir=str(data), batch_size=1, num_epochs=1, on_bad_image="skip")
    assert train(config).steps == 6
    skipped = lines_of(config, "skipped_image")
    valid, train_image = ("valid", "00001.jpg"), ("train", "00002.jpg")  # validation comes before and after the epoch
    assert [Path(line["path"]).parts[-2:] for line in skipped] == [valid, train_image, valid]
    assert [line["image_id"] for line in skipped] == [2, 3, 2]
    printed = capsys.readouterr().out
    assert printed.count("skipped image") == 3
    # An image that validation meets twice is one.
    assert lines_of(config, "end")[0]["num_skipped"] == 2
    assert "00002.jpg" in printed


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.name=./none", "does not exist"),
        ("model.name={folder}", r"weights .*model\.safetensors could not be loaded"),
        ("model.resolution=100", "multiple of 56"),
    ],
)
def test_a_base_model_that_cannot_be_used_is_told_before_the_data_are_read(
    key, message, make_config, lively_base, tmp_path, monkeypatch
):
    # An index of a large set takes minutes.
    folder = shutil.copytree(lively_base, tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    read = []
    monkeypatch.setattr(trainer, "read_splits", read.append)
    with pytest.raises(UserError, match=message):
        train(make_config(key.format(folder=folder)))
    assert not read


def test_gpu_that_is_not_there(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"scaling\.use_gpu"):
        train(make_config("scaling.use_gpu=true"))
