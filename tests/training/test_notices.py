"""A run that is told to end saves first, and goes on from there as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sam3lora.cli import main
from sam3lora.errors import DiskFull, RunStopped
from sam3lora.training import trainer
from sam3lora.training.launch import train
from sam3lora.training.sigterm import STOP_FILE, on_sigterm, passed_on

from .run_folder import adapter_of, assert_equal, checkpoints_of, lines_of


def sigterm_in_step(monkeypatch, step: int) -> None:
    original = trainer.optimizer_step

    def told(run, group):
        if run.state.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(run, group)

    monkeypatch.setattr(trainer, "optimizer_step", told)


def test_sigterm_saves_and_the_run_goes_on_from_there(make_config, monkeypatch):
    # In the second of three steps of the first epoch; the next attempt repeats no step, and the adapter is the same.
    straight = train(make_config(output="straight"))
    config = make_config()
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        sigterm_in_step(patched, 2)
        with pytest.raises(RunStopped, match=r"after step 2\b.*--resume"):
            train(config)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints_of(config) == ["step_00000002"]
    assert len(lines_of(config, "step")) == 2
    train(config, resume=True)
    assert [line["step"] for line in lines_of(config, "step")] == [1, 2, 3, 4, 5, 6]
    assert_equal(adapter_of(config), adapter_of(straight))


def test_sigterm_in_the_last_step_ends_nothing_early(make_config, monkeypatch):
    sigterm_in_step(monkeypatch, 2)
    assert train(make_config(max_steps=2)).steps == 2


def test_the_command_ends_with_the_status_of_sigterm(make_config, monkeypatch, tmp_path, capsys):
    sigterm_in_step(monkeypatch, 1)
    file = tmp_path / "config.yaml"
    file.write_text(make_config().to_yaml())
    assert main(["train", str(file)]) == 143
    shown = capsys.readouterr().err
    assert shown.startswith("error: stopped by SIGTERM")
    assert "Traceback" not in shown


def test_a_second_sigterm_is_not_held_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append("before"))
    try:
        with on_sigterm(lambda: heard.append("first")):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["first", "before", "before"]


def test_the_process_that_waits_for_workers_passes_sigterm_on(tmp_path):
    # A file of an earlier start, whose process was killed, stops nothing.
    (tmp_path / STOP_FILE).touch()
    with passed_on(tmp_path):
        assert not (tmp_path / STOP_FILE).exists()
        signal.raise_signal(signal.SIGTERM)
        assert (tmp_path / STOP_FILE).exists()
    assert not (tmp_path / STOP_FILE).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_while_metrics_are_written(make_config, monkeypatch):
    # The message names the file and the way on; the checkpoint before is intact.
    config = make_config(save_steps=1)
    file = Path(config.output.output_dir) / "metrics.jsonl"
    with monkeypatch.context() as patched:
        original = trainer.optimizer_step

        def fill(run, group):
            if run.state.step == 2:
                run.log._file = Path("/dev/full")
            return original(run, group)

        patched.setattr(trainer, "optimizer_step", fill)
        with pytest.raises(DiskFull, match=r"/dev/full.*--resume"):
            train(config)
    assert checkpoints_of(config) == ["step_00000001", "step_00000002"]
    assert train(config, resume=True).steps == 6
    assert file.is_file()
