"""What a person sees of a sweep while it runs, whatever the trials are called and whatever lies in their folders."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from sam3lora.tune.run import progress, trial_summary
from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.run.progress import ProgressLines, RecordReader, describe_end, show_progress, trial_table

from .made_sweeps import draw_trials, make_space, trial

LABELS = {"[/a]": ["q_proj"], "[bold]x": ["v_proj"], ":smile: b": ["fc1"]}
LABELLED = {"lora.target_modules": {"choice": LABELS}}


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False, soft_wrap=True, **options)


def text_of(output: Console) -> str:
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue()


def drawn(space, records, **options) -> list[list[str]]:
    output = console()
    output.print(trial_table(space, records, **options))
    return [line.split() for line in text_of(output).splitlines()]


def test_table():
    space = make_space(parameters={"lora.rank": {"choice": [4, 8, 16]}})
    records = [
        trial(0, 0.4, 1_000, lora__rank=16),
        replace(trial(1, 0.5, 2_000, lora__rank=8), epochs=3, seconds=75.0),
        replace(trial(2, None, lora__rank=4), status="failed", failure="out of memory", epochs=0),
        replace(trial(3, 0.1, lora__rank=4), status="running", epochs=2),
        replace(trial(4, None), status="pending", epochs=0),
    ]
    heading, *rows, caption = drawn(space, records)
    assert heading == ["trial", "status", "map", "epoch", "rank", "parameters", "time"]
    epochs = space.base.training.num_epochs
    assert rows == [
        ["3", "running", "0.1", f"2/{epochs}", "4", "1,000", "0:00:00"],
        ["1", "finished", "0.5", f"3/{epochs}", "8", "2,000", "0:01:15"],
        ["0", "base", "finished", "0.4", f"1/{epochs}", "16", "1,000", "0:00:00"],
        ["2", "failed:", "out", "of", "memory", f"0/{epochs}", "4", "1,000", "0:00:00"],
        ["4", "pending", f"0/{epochs}", "1,000", "0:00:00"],
    ]
    assert " ".join(caption).endswith("trials: 1 running, 2 finished, 1 failed, 1 pending")
    assert "3 more rows" in " ".join(drawn(space, records, most_rows=2)[-1])


def test_names_and_labels_are_no_markup():
    space = make_space(parameters=LABELLED)
    records = [trial(n, 0.1, lora__target_modules=modules) for n, modules in enumerate(LABELS.values(), start=1)]
    shown = "\n".join(" ".join(row) for row in drawn(space, records))
    output = console()
    lines = ProgressLines(space, output)
    lines.show(records)
    for text in (shown, text_of(output)):
        assert all(label in text for label in LABELS)


def test_lines():
    space = make_space(parameters={"lora.rank": {"choice": [4, 8, 16]}})
    output = console()
    lines = ProgressLines(space, output)

    def said(*records: TrialRecord) -> list[str]:
        before = len(text_of(output))
        lines.show(records)
        return [line.partition("  ")[2] for line in text_of(output)[before:].splitlines()]

    begun = replace(trial(1, lora__rank=8), status="running", epochs=0)
    history = [{"epoch": 1, "train_loss": 2.0, "valid_loss": 1.5, "map": None}]
    after_one = replace(begun, epochs=1, history=history)
    assert said(replace(begun, status="pending")) == []
    assert said(begun) == ["trial 1 starts [rank 8]"]
    assert said(begun) == []
    total = space.base.training.num_epochs
    assert said(after_one) == [f"trial 1 epoch 1/{total}: train_loss 2, valid_loss 1.5"]
    ended = replace(after_one, status="stopped", value=0.5, seconds=75.0)
    assert said(after_one, ended) == ["trial 1 stopped early, map 0.5 at epoch 1, 0:01:15 [rank 8]"]
    failed = replace(trial(2, lora__rank=4), status="failed", failure="exception", reason="first\n  second")
    assert said(ended, failed) == ["trial 2 failed (exception): first second [rank 4]"]
    assert said(ended, failed) == []
    retried = replace(trial(0, 0.25), retries=[{"reason": "out of memory", "batch_size": 1}])
    assert "batch_size 1 after running out of memory [base configuration]" in describe_end(space, retried)


def test_the_metric_that_is_searched_for_is_shown():
    output = console()
    running = replace(
        trial(1), status="running", history=[{"epoch": 1, "valid_loss": 1.5, "noc_85": 5.0, "noc_90": 9.5}]
    )
    ProgressLines(make_space("noc_90"), output).show([running])
    assert text_of(output).rstrip().endswith("valid_loss 1.5, noc_85 5, noc_90 9.5")


def test_a_resumed_sweep_tells_what_is_new(tmp_path):
    space, ledger, output = make_space(), Ledger(tmp_path), console()
    records = draw_trials(space, 3)
    begun = replace(records[2], status="running")
    for record in (*records[:2], begun):
        ledger.write(record)
    with show_progress(space, ledger, "lines", output):
        ledger.write(records[2])
    [line] = text_of(output).splitlines()
    assert f"trial 2 {records[2].status}" in line


@pytest.mark.parametrize("style", ["bar", "lines"])
def test_nothing_in_the_display_ends_the_sweep(tmp_path, monkeypatch, caplog, style):
    # A record that cannot be read is left out; a display that fails is no reason to stop, nor to say so.
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    space, ledger = make_space(parameters=LABELLED), Ledger(tmp_path)
    output = console(force_terminal=style == "bar")
    failures = []
    with show_progress(space, ledger, style, output):
        for number, text in enumerate(["{", "[]", json.dumps({"number": 1})]):
            folder = ledger.folder(number)
            folder.mkdir(parents=True)
            (folder / "trial.json").write_text(text)
        ledger.write(trial(3, 0.4321, lora__target_modules=["q_proj"]))
    assert "0.4321" in text_of(output)

    def fail(*arguments, **options):
        failures.append(arguments)
        raise RuntimeError("cannot draw")

    for name in ("trial_table", "describe_end"):
        monkeypatch.setattr(progress, name, fail)
    with show_progress(space, ledger, style, console()):
        ledger.write(trial(4, 0.5, lora__target_modules=["q_proj"]))
    assert failures
    assert caplog.text == ""


def test_ended_trials_are_read_once(tmp_path, monkeypatch):
    space, ledger = make_space(), Ledger(tmp_path)
    records = draw_trials(space, 3)
    for record in (*records[:2], replace(records[2], status="running")):
        ledger.write(record)
    metrics = ledger.folder(2) / "metrics.jsonl"
    line = {"kind": "epoch", "epoch": 1, "step": 5, "unix_time": 1.0, "train_loss": 1.0, "map": 0.25}
    metrics.write_text(json.dumps(line) + "\n")
    reads, read = [], trial_summary.read_trial_record
    monkeypatch.setattr(trial_summary, "read_trial_record", lambda folder: reads.append(folder.name) or read(folder))
    reader = RecordReader(space, ledger)
    first = reader.records()
    assert [record.number for record in first] == [0, 1, 2]
    assert (first[2].value, first[2].epochs) == (0.25, 1)
    metrics.write_text(json.dumps(line) + "\n" + json.dumps(line | {"epoch": 2, "map": 0.5}) + "\n")
    assert (reader.records()[2].value, reader.records()[2].epochs) == (0.5, 2)
    assert reads == ["0000", "0001", "0002", "0002", "0002"]
