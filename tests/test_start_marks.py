"""Marks of a start: written only where they are asked for, and read while processes still write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.bench.start_up import Start, _drawn_data, _table, serve_start, train_start
from sam3lora.start_marks import FILE_VARIABLE, mark, read_marks


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    mark("model")
    assert not list(tmp_path.iterdir())


def test_marks_in_the_order_of_their_writing(tmp_path, monkeypatch):
    file = tmp_path / "marks"
    assert list(read_marks(file)) == []
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    mark("model")
    mark("data")
    with file.open("a") as half:
        half.write('{"done": "fir')  # another process is writing
    found = list(read_marks(file))
    assert [(one.done, one.pid) for one in found] == [("model", os.getpid()), ("data", os.getpid())]
    assert found[0].unix_time <= found[1].unix_time


def test_the_table_splits_the_medians():
    starts = [Start({"Ray": ray, "model": model}, 9, 1, 10.0) for ray, model in ((1.0, 4.0), (3.0, 9.0), (2.0, 5.0))]
    table = _table("train", starts)
    assert [(row["done"], row["seconds"], row["since the command"]) for row in table.rows] == [
        ("Ray", 2.0, 2.0),
        ("model", 3.0, 5.0),
    ]


@pytest.mark.slow
def test_the_worker_of_a_run_is_the_process_that_imported_ahead(tmp_path):
    train_start(tmp_path / "run", _drawn_data(tmp_path / "data"))
    assert_imported_ahead(tmp_path / "run" / "marks", "training worker")


@pytest.mark.slow
def test_the_model_replica_is_the_process_that_imported_ahead(tmp_path):
    start = serve_start(tmp_path / "service")
    assert_imported_ahead(tmp_path / "service" / "marks", "model")
    assert start.with_torch == 1


def assert_imported_ahead(marks: Path, of_actor: str) -> None:
    pids = {done: [one.pid for one in read_marks(marks) if one.done == done] for done in ("imports ahead", of_actor)}
    assert len(pids["imports ahead"]) == 1
    assert pids["imports ahead"] == pids[of_actor]
