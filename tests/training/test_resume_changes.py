"""What a resumed run compares with the run that it continues, and two runs that want the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sam3lora.cli import main
from sam3lora.errors import UserError
from sam3lora.training import trainer
from sam3lora.training.launch import train
from sam3lora.training.trainer import Trainer
from sam3lora.training.validator import DetectionValidator

from .changed_scenes import rewrite, rewritten, without_objects
from .run_folder import checkpoints_of, folder_of, lines_of


def move_a_box(content: dict) -> None:
    content["annotations"][0].update(bbox=[10, 10, 20, 20], segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])


def drop_last_image(content: dict) -> None:
    last = content["images"].pop()
    without_objects(last["id"])(content)


def state_of(run) -> dict:
    """The newest checkpoint's position in the run."""
    return json.loads((folder_of(run) / "checkpoints" / checkpoints_of(run)[-1] / "state.json").read_text())["state"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Where `begun` trains once."""
    return tmp_path_factory.mktemp("begun") / "run"


@pytest.fixture
def begun(make_config, scenes, tmp_path, made):
    """A run that stopped in the middle of its second epoch, on data that a test may change."""
    data = rewritten(scenes, tmp_path / "data", lambda content: None)
    config = make_config("evaluation.base_loss=false", data_dir=str(data), save_steps=1, max_steps=4)
    if not made.exists():
        train(config.changed({"output.output_dir": str(made)}))
    shutil.copytree(made, config.output.output_dir)
    return config.changed({"training.max_steps": None})


@pytest.mark.parametrize(
    ("split", "change", "told"),
    [
        ("train", move_a_box, r"resume .*: train labels \(was (\d+) \[digest \w+\], is \1 \[digest \w+\]\)\. "),
        ("train", drop_last_image, r"train images \(was 6 \[digest \w+\], is 5 \[digest \w+\]\), train labels"),
        ("valid", drop_last_image, r"resume .*: valid images \(was 3 .*, is 2 "),
    ],
    ids=["other labels", "fewer images", "fewer validation images"],
)
def test_other_data_are_refused(begun, split, change, told):
    # By the command, which leaves the folder as it was; and by a worker that starts again within a run.
    before = {path: path.stat().st_mtime_ns for path in folder_of(begun).rglob("*")}
    rewrite(Path(begun.training.data_dir) / split, change)
    with pytest.raises(UserError, match=told):
        train(begun, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder_of(begun).rglob("*")} == before
    with pytest.raises(UserError, match=told):
        Trainer(begun, folder_of(begun), use_ray=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training.seed": 7}, r"training\.seed \(was 42, is 7\)"),
        ({"training.loss.presence": 1}, r"training\.loss\.presence \(was 20\.0, is 1\.0\)"),
    ],
)
def test_another_seed_or_loss_is_refused_in_one_message(begun, tmp_path, capfd, changes, told):
    with pytest.raises(UserError, match=told):
        train(begun.changed(changes), resume=True)
    (tmp_path / "begun.yaml").write_text(begun.to_yaml())
    command = ["train", str(tmp_path / "begun.yaml"), *(f"{key}={value}" for key, value in changes.items())]
    assert main([*command, "--resume"]) == 2
    assert "--resume-anyway" in capfd.readouterr().err
    assert main([*command, "training.max_steps=5", "--resume-anyway"]) == 0
    assert lines_of(begun, "step")[-1]["step"] == 5


def test_resume_anyway_goes_on_with_other_data(begun, scenes):
    # The fourth step was the first of the second epoch. The epoch begins again, on five images: three steps. Losses on
    # other data do not compare, so the next validation makes the best adapter.
    assert (state_of(begun)["epoch"], state_of(begun)["step_in_epoch"]) == (1, 1)
    rewrite(Path(begun.training.data_dir) / "train", drop_last_image)
    result = train(begun, resume="anyway")
    assert [line["step"] for line in lines_of(begun, "step")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["epoch"] for line in lines_of(begun, "step")] == [1, 1, 1, 2, 2, 2, 2]
    assert result.history[-1]["step"] == state_of(begun)["best_step"] == 7
    [warning] = lines_of(begun, "warning")
    assert "resumed at step 4, from the start of epoch 2, with changes: train images (was 6 [" in warning["message"]
    # From here on it is a run on these data.
    train(begun.changed({"training.num_epochs": 3}), resume=True)
    assert len(lines_of(begun, "warning")) == 1


def test_what_was_accepted_is_not_all_that_may_come(begun):
    # The data of `--resume-anyway` change once more while its workers start again.
    rewrite(Path(begun.training.data_dir) / "train", drop_last_image)
    with pytest.raises(UserError, match="train images"):
        Trainer(begun, folder_of(begun), use_ray=False, accepted_data={"train images": "6 [digest other]"})


def test_checkpoint_that_does_not_say_its_data(begun):
    # Those of earlier versions go on, with a word.
    for name in checkpoints_of(begun):
        file = folder_of(begun) / "checkpoints" / name / "state.json"
        content = json.loads(file.read_text())
        del content["data"], content["base"]
        file.write_text(json.dumps(content))
    assert train(begun, resume=True).steps == 6
    [warning] = lines_of(begun, "warning")
    assert "were not compared, nor the fingerprint of its base model" in warning["message"]


def test_a_moved_base_is_the_same_and_another_is_refused(begun, tmp_path):
    moved = shutil.copytree(begun.model.name, tmp_path / "moved")
    assert train(begun.changed({"model.name": str(moved), "training.max_steps": 5}), resume=True).steps == 5
    with pytest.raises(UserError, match=r"base model \(was fingerprint \w{12}, is fingerprint \w{12}\)"):
        train(begun.changed({"model.name": "tiny"}), resume="anyway")


def test_no_step_is_left(begun):
    # `--resume` says so and succeeds; `--resume-anyway` was to do something, and does not touch the folder.
    done = begun.changed({"training.max_steps": 4})
    before = {path: path.stat().st_mtime_ns for path in folder_of(begun).rglob("*")}
    with pytest.raises(UserError, match=r"no step is left .*training\.max_steps \(now 4\)"):
        train(done.changed({"training.seed": 7}), resume="anyway")
    assert {path: path.stat().st_mtime_ns for path in folder_of(begun).rglob("*")} == before
    assert train(done, resume=True).steps == 4
    [warning] = lines_of(begun, "warning")
    assert "no step is left of this run" in warning["message"]


def test_a_run_that_stopped_early_goes_on_with_more_patience(begun):
    file = folder_of(begun) / "checkpoints" / checkpoints_of(begun)[-1] / "state.json"
    content = json.loads(file.read_text())
    content["state"] |= {"finished": True, "evaluations_without_improvement": 2, "best_loss": 0.0}
    file.write_text(json.dumps(content))
    assert train(begun.changed({"training.early_stopping_patience": 2}), resume=True).steps == 4
    assert train(begun.changed({"training.early_stopping_patience": 4}), resume=True).steps == 6


def test_metrics_measured_otherwise_choose_the_best_adapter_anew(begun, monkeypatch):
    # The first validation with the new settings makes the best adapter, though its value is lower than an earlier one.
    monkeypatch.setattr(DetectionValidator, "metrics", lambda validator: {"map": 0.2})
    begun = begun.changed({"evaluation.every_epochs": 1})
    file = folder_of(begun) / "checkpoints" / checkpoints_of(begun)[-1] / "state.json"
    content = json.loads(file.read_text())
    content["state"] |= {"best_metric": "map", "best_metric_value": 0.9, "best_values": {"map": [0.9, 3]}}
    file.write_text(json.dumps(content))
    train(begun.changed({"evaluation.num_samples": 2}), resume=True)
    assert state_of(begun)["best_values"]["map"] == [0.2, 6]
    assert json.loads((folder_of(begun) / "best" / "sam3lora.json").read_text())["metrics"]["map"] == 0.2
    [warning] = lines_of(begun, "warning")
    assert "evaluation.num_samples (was None, is 2)" in warning["message"]


def test_a_second_run_in_the_folder_is_refused(make_config, monkeypatch):
    # Fresh or resumed, while the first trains; afterwards the folder is free.
    config, refused = make_config("evaluation.base_loss=false", max_steps=2, save_steps=1), []
    original = trainer.optimizer_step

    def step(run, group):
        for resume in (False, True) if run.state.step == 1 else ():
            with pytest.raises(UserError, match="another process is training in") as error:
                train(config, resume=resume)
            refused.append(str(error.value))
        return original(run, group)

    monkeypatch.setattr(trainer, "optimizer_step", step)
    assert train(config).steps == 2
    assert len(refused) == 2
    assert str(folder_of(config)) in refused[0]
    assert train(config.changed({"training.max_steps": 3}), resume=True).steps == 3
