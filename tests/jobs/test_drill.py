"""The drill of docs/reliability.md: some of its faults, and what it does when a run does not keep its promise."""

from __future__ import annotations

import pytest

from jobs.bench.drill import table
from jobs.bench.drill.runs import DrillFailed, check_steps
from sam3lora.errors import UserError
from sam3lora.training.metrics_log import MetricsLog


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigterm-worker", "sigterm-driver", "disk-full-adapter"])
def test_a_run_that_is_disturbed(name, tmp_path):
    [row] = table.run_drills([name], keep=tmp_path).tables[0].rows
    if "cannot mount" in str(row):
        pytest.skip("this system lets nobody mount a small disk")
    assert row["status"] != table.FAILED, row
    assert (row["steps repeated"], row["adapter"]) == (0, "the same to the bit")


def test_a_failed_drill_is_a_row_and_the_others_go_on(monkeypatch, tmp_path):
    def broken(drill):
        """it breaks"""
        raise DrillFailed("another adapter")

    def fine(drill):
        """it does not"""
        return {"status": 0, "message": "a word"}

    monkeypatch.setattr(table, "DRILLS", {"broken": broken, "fine": fine})
    report = table.run_drills(keep=tmp_path)
    assert [row["status"] for row in report.tables[0].rows] == [table.FAILED, 0]
    assert report.facts["messages"] == {"it breaks": "another adapter", "it does not": "a word"}
    with pytest.raises(UserError, match=r"brocken.*broken, fine"):
        table.run_drills(["brocken"])


def test_steps_that_are_missing_or_there_twice(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 2, 4):
        log.write("step", step=step)
    for last in (2, 4):
        with pytest.raises(DrillFailed, match="each once"):
            check_steps(tmp_path, last)
