"""``metrics.jsonl``: one complete line at a time, valid JSON, and cut back when a run resumes."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from sam3lora.training.metrics_log import MetricsLog, memory_mb, read_metrics


def test_lines_are_readable_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("step", step=1, loss=0.123456789, terms={"loss_ce": 1e-9})
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("unix_time") == pytest.approx(time.time(), abs=60)
    # Numbers keep seven digits, which is float32.
    assert line == {"kind": "step", "step": 1, "loss": 0.1234568, "terms": {"loss_ce": 1e-9}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_value_is_null(tmp_path, value):
    # JSON has no NaN; a strict reader must be able to read the file.
    MetricsLog(tmp_path).write("epoch", step=1, map=value, terms={"loss": value})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["map"] is line["terms"]["loss"] is None


def test_resume_drops_the_steps_to_be_done_again(tmp_path):
    # Lines up to the checkpoint's step stay, also those without a step; later ones will be written again.
    log = MetricsLog(tmp_path)
    log.write("start", time="now")
    for step in (1, 2, 3):
        log.write("step", step=step)
    log.write("warning", message="idle")
    MetricsLog(tmp_path, after_step=2).write("step", step=3)
    kinds = [(line["kind"], line.get("step")) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == [("start", None), ("step", 1), ("step", 2), ("warning", None), ("step", 3)]


def test_a_new_run_starts_empty(tmp_path):
    MetricsLog(tmp_path).write("step", step=1)
    MetricsLog(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_is_left_out(tmp_path):
    # As after a crash while writing, or while another process writes.
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 1}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_memory_is_a_number_of_megabytes():
    assert 10 < memory_mb(torch.device("cpu")) < 1e6


def test_tensorboard_beside_it(tmp_path):
    # Values of steps become scalars with the terms' names.
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, tensorboard=True)
    log.write("step", step=3, loss=0.5, terms={"loss_ce": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["step/loss", "step/terms/loss_ce"]
    assert [(event.step, event.value) for event in events.Scalars("step/terms/loss_ce")] == [(3, 0.25)]
