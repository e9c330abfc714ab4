"""What a run does with a folder that holds something, and what it leaves there when it is cut at an odd moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sam3lora.errors import RunFailed, UserError
from sam3lora.model.adapter.metadata import read_metadata_values
from sam3lora.training import launch
from sam3lora.training.launch import train
from sam3lora.training.trainer import Trainer

from .run_folder import checkpoints_of, folder_of, lines_of

SHORT = ("evaluation.base_loss=false",)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content", ["mine: 1\n", '{"mine": 1}\n', b"\xff\xfe", None], ids=["text", "json", "bytes", "folder"]
)
def test_a_file_that_no_run_wrote_is_not_replaced(make_config, name, content):
    config = make_config(*SHORT, max_steps=1)
    file = folder_of(config) / name
    file.parent.mkdir(parents=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=name):
        train(config)
    assert file.is_dir() if content is None else file.stat().st_size == len(content)


def test_a_start_that_failed_may_be_repeated(make_config, monkeypatch):
    config = make_config(*SHORT, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(launch, "_run", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert train(config).steps == 1


def test_a_link_to_nowhere_is_not_taken_for_an_empty_place(make_config):
    config = make_config(*SHORT, max_steps=1)
    folder_of(config).mkdir(parents=True)
    (folder_of(config) / "last").symlink_to("nowhere")
    with pytest.raises(UserError, match="already holds an adapter"):
        train(config)


def test_last_is_written_where_the_run_was_cut_after_its_last_checkpoint(make_config, monkeypatch):
    config = make_config(*SHORT, max_steps=2, save_steps=1)
    real = Trainer._save_adapter

    def cut(trainer: Trainer, name: str, metrics: dict) -> None:
        if name == "last" and trainer.state.step == 2:
            raise KeyboardInterrupt
        real(trainer, name, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_adapter", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    last = folder_of(config) / "last"
    assert read_metadata_values(last)["metrics"]["step"] == 1
    assert train(config, resume=True).steps == 2
    assert read_metadata_values(last)["metrics"]["step"] == 2
    shutil.rmtree(last)
    train(config, resume=True)
    assert read_metadata_values(last)["metrics"]["step"] == 2


def test_a_copy_of_a_checkpoint_is_neither_resumed_nor_counted(make_config):
    config = make_config(*SHORT, max_steps=2, save_steps=1, save_total_limit=1)
    train(config)
    checkpoints = folder_of(config) / "checkpoints"
    for name in ("step_best", "step_00000002.bak", "step_9"):
        shutil.copytree(checkpoints / "step_00000002", checkpoints / name)
    train(config.changed({"training.max_steps": 4}), resume=True)
    assert lines_of(config, "start")[-1]["step"] == 2
    assert set(checkpoints_of(config)) == {"step_00000004", "step_00000002.bak", "step_9", "step_best"}


def test_curves_that_cannot_be_drawn_do_not_fail_a_finished_run(make_config, caplog):
    config = make_config(*SHORT, "logging.plots=true", max_steps=1)
    folder_of(config).mkdir(parents=True)
    (folder_of(config) / "plots").write_text("a file, where a folder is to be")
    assert train(config).steps == 1
    assert "plots" in caplog.text


def test_a_checkpoint_that_the_system_refuses_is_one_message(make_config, monkeypatch):
    config = make_config(*SHORT, max_steps=2, save_steps=1)
    real = os.rename

    def refuse(source, target) -> None:
        if Path(target).name == "step_00000002":
            raise OSError(30, "Read-only file system", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(RunFailed, match=r"cannot write .*step_00000002 .*--resume"):
        train(config)
    assert checkpoints_of(config) == ["step_00000001"]


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    from sam3lora.training.metrics_log import append_line, read_metrics

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "start"}\n{"kind": "st')
    append_line(file, "warning", message="resumed")
    append_line(file, "note", message="and so on")
    assert [line["kind"] for line in read_metrics(file)] == ["start", "warning", "note"]
