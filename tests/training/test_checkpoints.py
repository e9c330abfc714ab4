"""Checkpoints come back exactly, are whole or ignored, and hold no pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sam3lora import files
from sam3lora.config import load_config
from sam3lora.config.loss import LossSection
from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.training.checkpoint_folders import list_checkpoints, read_state
from sam3lora.training.checkpoints import load_checkpoint, save_checkpoint
from sam3lora.training.detection import Detection
from sam3lora.training.optimization import build_optimizer
from sam3lora.training.saved_run import RunState, SavedRun, refuse_changes

SETTINGS = {"model": {"name": "tiny"}, "lora": {"rank": 2, "alpha": 4}, "data": {}, "training": {"num_epochs": 3}}
DATA = {"train images": "8 [digest aa]", "train labels": "20 [digest bb]"}
DETECTION = Detection()


def make_run(seed: int, steps: int):
    """A small adapter and its optimizer after some steps; one module never gets a gradient."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model = apply_lora(net, LoraSettings(rank=2, dropout=0, target_modules=("0", "1", "2"), components=None))
    optimizer = build_optimizer(model, learning_rate=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net[1](net[0](torch.randn(5, 3))).square().mean().backward()
        optimizer.step()
    return model, optimizer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(root: Path, step: int = 5, keep: int = 3, settings=None, base=None) -> Path:
    model, optimizer = make_run(seed=step, steps=2)
    state = RunState(step=step, epoch=1)
    return save_checkpoint(
        root, DETECTION.learned(model), model, optimizer, state, settings or SETTINGS, DATA, keep=keep, base=base
    )


def changes(folder: Path, sections=None, data=None) -> list[str]:
    """What is told of going on with other values of sections."""
    return read_state(folder).changes(SETTINGS | (sections or {}), data or DATA)


def test_round_trip(tmp_path):
    # Adapter, moments and position come back exactly; the next step is the one that was to come.
    model, optimizer = make_run(seed=0, steps=3)
    state = RunState(
        step=7, epoch=2, step_in_epoch=1, best_loss=0.1234567890123456, best_step=5, epoch_sums={"loss_ce": 1 / 3},
        epoch_counts=[1.0, 2.0, 3.0], images_per_step=4,
    )  # fmt: skip
    folder = save_checkpoint(tmp_path, DETECTION.learned(model), model, optimizer, state, SETTINGS, DATA, keep=1)
    other, other_optimizer = make_run(seed=0, steps=1)
    DETECTION.restore(other, load_checkpoint(folder, other, other_optimizer, DETECTION.learned(other)))
    saved = read_state(folder)
    assert (saved.state, saved.settings, saved.data) == (state, SETTINGS, DATA)
    for name, value in weights(model).items():
        assert torch.equal(weights(other)[name], value), name
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        for parameter in each.parameters():
            parameter.grad = torch.randn(parameter.shape) if parameter.requires_grad else None
        its_optimizer.step()
    for name, value in weights(model).items():
        assert torch.equal(weights(other)[name], value), name


def test_no_pickle(tmp_path):
    # Three files, of which two are safetensors and one is JSON.
    folder = save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    json.loads((folder / "state.json").read_text())


def test_keep_limit(tmp_path):
    # Only the newest stay, by step and not by time or name's length.
    for step in (9, 10, 100, 1000):
        save(tmp_path, step=step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000100", "step_00001000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_00001000"]


def test_saving_a_step_again_replaces_it(tmp_path):
    # A resumed run reaches a step that a lost attempt had saved.
    first = (save(tmp_path) / "state.json").read_text()
    settings = SETTINGS | {"training": {"num_epochs": 4}}
    second = (save(tmp_path, settings=settings) / "state.json").read_text()
    assert first != second
    assert len(list(tmp_path.iterdir())) == 1


def test_a_setting_that_is_newer_than_the_run(tmp_path):
    # The run went on as by its default; another value is refused as ever. The same within the loss.
    folder = save(tmp_path, settings=SETTINGS | {"training": {"loss": {"presence": 7}}})
    model = {"name": "tiny", "quantization": "none"}
    assert changes(folder, {"model": model, "training": {"loss": {"presence": 7, "mask": LossSection().mask}}}) == []
    assert changes(
        folder, {"model": model | {"quantization": "nf4"}, "training": {"loss": {"presence": 7, "mask": 1}}}
    ) == [
        "model.quantization (was 'none', is 'nf4')",
        f"training.loss.mask (was {LossSection().mask}, is 1)",
    ]


def test_a_run_that_did_not_note_its_data(tmp_path):
    # Checkpoints of earlier versions.
    folder = save(tmp_path)
    content = json.loads((folder / "state.json").read_text())
    del content["data"], content["state"]["images_per_step"]
    (folder / "state.json").write_text(json.dumps(content))
    assert read_state(folder).data is None
    assert changes(folder) == changes(folder, data={"train images": "9 [digest cc]"}) == []


@pytest.mark.parametrize("missing", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_half_written_is_never_chosen(tmp_path, missing):
    # A folder that lacks a file, or still has its scratch name, is no checkpoint.
    good = save(tmp_path, step=5)
    shutil.copytree(good, tmp_path / "step_00000006")
    (tmp_path / "step_00000006" / missing).unlink()
    shutil.copytree(good, tmp_path / ".0123.tmp")
    assert list_checkpoints(tmp_path) == [good]


def test_nothing_saved_yet(tmp_path):
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "absent") == []


def test_a_crash_while_writing_leaves_the_old_ones(tmp_path, monkeypatch):
    # Whatever fails, on whatever file: the folder is absent, no scratch stays, and the one before is still there.
    good = save(tmp_path, step=5)

    def fail(*arguments, **options):
        raise OSError("disk full")

    for name in ("_sync", "replace_folder"):
        with monkeypatch.context() as patched:
            patched.setattr(files, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save(tmp_path, step=6)
        assert list(tmp_path.iterdir()) == [good]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def with_values(**changed):
    """A valid file with values of another type."""

    def write(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return write


def with_tensors(name_of, value_of=lambda value: value):
    """A valid file with other names, without those that become None, or with other shapes."""

    def write(path: Path) -> None:
        changed = {name_of(name): value_of(value).contiguous() for name, value in load_file(path).items()}
        save_file({name: value for name, value in changed.items() if name is not None}, path)

    return write


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter.safetensors", truncate),
        ("optimizer.safetensors", truncate),
        ("state.json", truncate),
        ("state.json", lambda path: path.write_text("{}")),
        ("state.json", lambda path: path.write_text(json.dumps({"settings": SETTINGS, "state": {"other": 1}}))),
        ("adapter.safetensors", lambda path: path.write_bytes(b"")),
        ("state.json", with_values(settings=[])),
        ("state.json", with_values(settings={"model": ["a"]})),
        ("state.json", with_values(settings={"training": {"loss": "a"}})),
        ("state.json", with_values(data=["a"])),
        ("state.json", with_values(base=3)),
        ("state.json", with_values(state={"step": "12"})),
        ("state.json", with_values(state={"step": -1})),
        ("state.json", with_values(state={"epoch_counts": [1.0]})),
        ("adapter.safetensors", with_tensors(lambda name: f"other.{name}")),
        ("adapter.safetensors", with_tensors(lambda name: None if "lora_A" in name else name)),
        ("adapter.safetensors", with_tensors(lambda name: name, lambda value: value[:1])),
        ("optimizer.safetensors", with_tensors(lambda name: f"other.{name}")),
        ("optimizer.safetensors", with_tensors(lambda name: None)),
        ("optimizer.safetensors", with_tensors(lambda name: None if name.endswith("exp_avg") else name)),
        (
            "optimizer.safetensors",
            with_tensors(lambda name: name, lambda value: value[..., :1] if value.ndim else value),
        ),
    ],
)
def test_damaged_file(tmp_path, file, damage):
    # The message names the checkpoint and what to do; the model is not touched.
    folder = save(tmp_path)
    damage(folder / file)
    model, optimizer = make_run(seed=1, steps=1)
    before = weights(model)

    def resume() -> None:
        read_state(folder)
        load_checkpoint(folder, model, optimizer, DETECTION.learned(model))

    with pytest.raises(UserError, match=r"step_00000005 is damaged .*remove it"):
        resume()
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())


def test_how_long_and_how_fast_may_change(tmp_path):
    folder = save(tmp_path)
    other = {"num_epochs": 9, "max_steps": 7, "learning_rate": 0.5, "batch_size": 8, "warmup_steps": 3}
    assert changes(folder, {"training": other}) == []


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("model", {"name": "other"}, "model.name (was 'tiny', is 'other')"),
        ("lora", {"rank": 8, "alpha": 4}, "lora.rank (was 2, is 8)"),
        ("data", {"categories": ["a"]}, "data.categories (was None, is ['a'])"),
        ("training", {"seed": 7}, "training.seed (was 42, is 7)"),
        ("training", {"loss": {"presence": 1}}, "training.loss.presence (was 20.0, is 1)"),
        ("training", {"one_to_many": False}, "training.one_to_many (was True, is False)"),
        ("training", {"num_negatives": 0}, "training.num_negatives (was 3, is 0)"),
    ],
)
def test_what_decides_a_step_is_refused_by_name(tmp_path, section, value, told):
    # The rank of the adapter, and the base, are never accepted: saved weights would not fit.
    folder = save(tmp_path)
    found = changes(folder, {section: value})
    assert found == [told]
    with pytest.raises(UserError, match=re.escape(told)) as error:
        refuse_changes(folder, found)
    assert ("--resume-anyway" in str(error.value)) == (section not in ("model", "lora"))
    if section in ("model", "lora"):
        with pytest.raises(UserError, match=re.escape(told)):
            refuse_changes(folder, found, accepted=True)
    else:
        refuse_changes(folder, found, accepted=True)


def test_other_data_are_told_apart(tmp_path):
    folder = save(tmp_path)
    assert changes(folder, data=DATA | {"train labels": "20 [digest cc]"}) == [
        "train labels (was 20 [digest bb], is 20 [digest cc])"
    ]


def test_a_run_that_goes_on_by_another_metric_forgets_the_best_value_of_the_first():
    state = RunState(step=8, best_metric="map", best_metric_value=0.4, best_loss=9.0, best_step=4)
    state.judge_by("map")
    assert (state.best_metric_value, state.best_step) == (0.4, 4)
    state.judge_by("bbox_map")
    assert (state.best_metric_value, state.best_loss, state.best_step) == (None, None, None)


@pytest.mark.parametrize("metric", ["map", "valid_loss"])
@pytest.mark.parametrize(
    ("evaluation", "kept"),
    [
        ({}, {"map", "valid_loss", "train_loss"}),
        ({"every_epochs": 1}, {"map", "valid_loss", "train_loss"}),
        ({"threshold": 0.3}, {"valid_loss", "train_loss"}),
        ({"num_samples": 10}, {"train_loss"}),
    ],
)
def test_what_was_measured_with_other_settings_does_not_compare(metric, evaluation, kept):
    values = {"map": [0.4, 4], "valid_loss": [9.0, 4], "train_loss": [8.0, 2]}
    base_values = {"map": 0.1, "valid_loss": 12.0, "train_loss": 13.0}
    state = RunState(step=8, best_metric=metric, best_step=4, best_values=values, base_values=base_values)
    saved = SavedRun({"evaluation": {"every_epochs": 2}}, state)
    goes_on = saved.state_with({"evaluation": {"every_epochs": 2} | evaluation})
    assert goes_on.best_values.keys() == goes_on.base_values.keys() == kept
    assert goes_on.best_step == (4 if metric in kept else None)
    of_losses = saved.changes_of_measuring({"evaluation": evaluation}, with_metrics=False)
    assert bool(of_losses) == ("valid_loss" not in kept)
    assert state.best_values == values  # as it was saved


def test_where_the_base_comes_from_may_change(tmp_path):
    # By its fingerprint the base is known wherever it lies; without a model, as in the driver, it is not compared.
    saved = read_state(save(tmp_path, base="a" * 64))
    moved = SETTINGS | {"model": {"name": "elsewhere", "revision": "v2", "local_files_only": True}}
    assert saved.changes(moved, DATA, "a" * 64) == saved.changes(moved, DATA) == []
    other = saved.changes(SETTINGS, DATA, "b" * 64)
    assert other == ["base model (was fingerprint aaaaaaaaaaaa, is fingerprint bbbbbbbbbbbb)"]
    with pytest.raises(UserError, match="base model"):
        refuse_changes(tmp_path, other, accepted=True)


def test_how_the_base_computes_may_be_accepted(tmp_path):
    # Attention and type leave the adapter what it is; another input or another base does not.
    folder = save(tmp_path)
    how = changes(folder, {"model": {"name": "tiny", "attention": "eager", "dtype": "bfloat16"}})
    assert [change.split()[0] for change in how] == ["model.dtype", "model.attention"]
    with pytest.raises(UserError, match="--resume-anyway"):
        refuse_changes(folder, how)
    refuse_changes(folder, how, accepted=True)
    for model in ({"resolution": 28}, {"geometry_cls": False}, {"quantization": "nf4"}):
        with pytest.raises(UserError, match=f"model.{next(iter(model))}"):
            refuse_changes(folder, changes(folder, {"model": {"name": "tiny"} | model}), accepted=True)


@pytest.mark.parametrize(
    ("training", "anew", "named"),
    [
        ({"num_epochs": 3}, False, []),
        ({"num_epochs": 2}, False, ["num_epochs"]),
        ({"num_epochs": 2, "max_steps": 8}, True, ["num_epochs", "max_steps"]),
        ({"num_epochs": 3, "max_steps": 9}, False, []),
        ({"num_epochs": 3, "early_stopping_patience": 4}, False, ["early_stopping_patience"]),
        ({"num_epochs": 3, "early_stopping_patience": 4}, True, []),
        ({"num_epochs": 3, "early_stopping_patience": 5}, False, []),
    ],
)
def test_whether_a_step_is_left(training, anew, named):
    # After two epochs, eight steps, and an early stop after four validations without a better one.
    state = RunState(step=8, epoch=2, finished=True, evaluations_without_improvement=4)
    config = load_config({"lora": {"apply_to_scoring": True}, "training": training})
    told = SavedRun(config.model_dump(mode="json"), state).why_no_step_left(config, anew=anew)
    assert re.findall(r"set training\.(\w+)", told or "") == named
