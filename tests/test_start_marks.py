"""Marks of a start: written only where they are asked for, and read while processes still write them."""

from __future__ import annotations

import os

from jobs.bench.start_up import Start, _table
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
