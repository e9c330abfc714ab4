"""The progress of a run, from the lines of ``metrics.jsonl``."""

from __future__ import annotations

import time

import pytest

from sam3lora.training.metrics_log import MetricsLog, describe_line, follow

START = {
    "step": 0,
    "device": "cpu",
    "num_workers": 2,
    "num_train_images": 12,
    "num_valid_images": 3,
    "prompts": ["crack", "hole"],
}
STEP = {
    "total_steps": 20,
    "epoch": 1,
    "loss": 1.5,
    "terms": {"loss_ce": 0.25, "loss_ce_o2m": 9.0},
    "lr": 1e-4,
    "images_per_second": 3.25,
    "memory_mb": 512.4,
}


def start(log: MetricsLog, time: str) -> None:
    log.write("start", time=time, **START)


def test_lines():
    # The important numbers of every kind of line, without the one-to-many terms.
    lines = {
        "start": ({**START}, "12 training and 3 validation images, 2 workers on cpu, prompts: crack, hole"),
        "step": ({**STEP, "step": 4}, "step 4/20 loss 1.5 lr 1.00e-04 3.2 images/s 512 MB | loss_ce 0.25"),
        "epoch": (
            {"epoch": 2, "train_loss": 1.25, "valid_loss": 1.5, "map": 0.25, "map_50": None},
            "epoch 2: train loss 1.25, valid loss 1.5, map 0.250",
        ),
        "epoch without validation": ({"epoch": 1, "train_loss": 2.0, "valid_loss": None}, "epoch 1: train loss 2"),
        "base": ({"valid_loss": 1.5, "mean_iou_3": 0.75}, "base: valid loss 1.5, mean_iou_3 0.750"),
        "base that overflows": ({"valid_loss": None}, "base: valid loss not finite"),
        "warning": ({"message": "idle: a, b"}, "warning: idle: a, b"),
        "skipped_image": ({"path": "a.jpg", "reason": "the file is empty"}, "skipped image a.jpg: the file is empty"),
        "early_stop": ({"best_loss": 1.25, "best_step": 8}, "stopped early: the best loss was 1.25 at step 8"),
        "end": ({}, None),
    }
    for kind, (values, text) in lines.items():
        assert describe_line({"kind": kind.split()[0], **values}) == text


def test_the_metric_that_decides_is_shown(tmp_path, capsys):
    epoch = {"epoch": 1, "train_loss": 2.0, "valid_loss": 1.5, "noc_85": 5.0, "noc_90": 11.5}
    for decides, shown in (("noc_90", ", noc_90 11.500"), ("noc_85", ""), ("valid_loss", "")):
        with follow(tmp_path, "lines"):
            log = MetricsLog(tmp_path)
            log.write("start", time=decides, best_metric=decides, **START)
            log.write("epoch", **epoch)
        assert capsys.readouterr().out.splitlines()[-1] == f"epoch 1: train loss 2, valid loss 1.5, noc_85 5.000{shown}"


def test_follow_prints_what_is_written(tmp_path, capsys):
    # All lines are out when the block ends, in order, and names with brackets are no markup.
    with follow(tmp_path, "lines"):
        log = MetricsLog(tmp_path)
        start(log, "2026-01-01T10:00:00.000")
        log.write("warning", message="[red]bracket[/red]")
        log.write("step", step=1, **STEP)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["12", "warning:", "step"]
    assert "[red]bracket[/red]" in printed[1]


def test_a_line_is_shown_while_the_block_runs(tmp_path, capsys):
    with follow(tmp_path, "lines"):
        log = MetricsLog(tmp_path)
        start(log, "2026-01-01T10:00:00.000")
        printed, deadline = "", time.monotonic() + 10
        while not printed and time.monotonic() < deadline:
            printed += capsys.readouterr().out
            time.sleep(0.01)
        assert "12 training" in printed


def test_resume_shows_only_what_is_new(tmp_path, capsys):
    # The second attempt keeps the lines of the first up to its checkpoint; they were seen before.
    log = MetricsLog(tmp_path)
    start(log, "2026-01-01T10:00:00.000")
    log.write("step", step=1, **STEP)
    with follow(tmp_path, "lines"):
        log = MetricsLog(tmp_path, after_step=1)
        start(log, "2026-01-01T10:00:00.500")
        log.write("step", step=2, **STEP)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["12", "training"], ["step", "2/20"]]


def test_an_attempt_that_begins_again_is_shown(tmp_path, capsys):
    # A worker was lost and the run restarts from a checkpoint while it is being watched.
    with follow(tmp_path, "lines"):
        log = MetricsLog(tmp_path)
        start(log, "2026-01-01T10:00:00.000")
        log.write("step", step=1, **STEP)
        log = MetricsLog(tmp_path, after_step=1)
        start(log, "2026-01-01T10:00:00.250")
        log.write("step", step=2, **STEP)
    assert "step 2/20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("style", "shown"), [("bar", ("5/20 steps", "epoch 1: train loss 1, valid loss 2")), ("off", ())]
)
def test_bar_and_nothing(style, shown, tmp_path, capsys):
    with follow(tmp_path, style):
        log = MetricsLog(tmp_path)
        start(log, "2026-01-01T10:00:00.000")
        log.write("step", step=5, **STEP)
        log.write("epoch", epoch=1, train_loss=1.0, valid_loss=2.0)
    printed = capsys.readouterr().out
    assert all(part in printed for part in shown)
    assert bool(printed) == bool(shown)


def test_the_error_of_the_block_gets_through(tmp_path):
    # And the watching ends with it.
    with pytest.raises(ZeroDivisionError), follow(tmp_path, "lines"):
        _ = 1 / 0
