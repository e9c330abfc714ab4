"""The progress display: what it writes in a terminal and in a log."""

from __future__ import annotations

import threading

import pytest

from sam3lora import progress as module
from sam3lora.progress import Progress, repeatedly


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0] += 5`."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_text_has_count_note_speed_and_time_left(clock):
    # 20 images were done before; the speed is taken from the first new one on.
    progress = Progress(200, "images", style="off", done_before=20)
    assert progress.text() == "20/200 images"
    progress.advance(10)
    assert progress.text() == "30/200 images"
    clock[0] += 10
    progress.advance(40, note="3 bad")
    assert progress.text() == "70/200 images, 3 bad, 4.0 images/s, 0:00:32 left"
    progress.update(90, total=100)
    assert progress.text() == "90/100 images, 3 bad, 6.0 images/s, 0:00:02 left"
    assert Progress(unit="steps", style="off", note="starting").text() == "0/? steps, starting"


def test_lines_come_now_and_then_and_at_the_end(clock, capsys):
    with Progress(9, style="lines", done_before=2) as progress:
        for _ in range(6):
            clock[0] += 4
            progress.advance()
        progress.print("[red]bracket[/red]")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "2 of 9 images were finished before",
        "3/9 images",
        "6/9 images",
        "[red]bracket[/red]",
        "8/9 images",
    ]


def test_a_bar_shows_the_count_and_lines_above_it(capsys):
    with Progress(9, style="bar", stderr=True) as progress:
        progress.update(4)
        progress.print("a line")
    printed = capsys.readouterr()
    assert "4/9 images" in printed.err
    assert "a line" in printed.err
    assert not printed.out


def test_off_writes_nothing(capsys):
    with Progress(9, style="off", done_before=1) as progress:
        progress.advance()
        progress.print("a line")
    assert capsys.readouterr().out == ""
    assert not Progress(9).has_bar  # by itself it is lines where there is no terminal


def test_looking_repeats_and_happens_once_more_at_the_end():
    # Its faults are no faults of the work.
    looked, calls = threading.Event(), []

    def look():
        calls.append(None)
        looked.set()
        raise ValueError("unreadable")

    with repeatedly(look, seconds=0.001):
        assert looked.wait(10)
    during = len(calls)
    assert during >= 2
    with repeatedly(look, seconds=100):
        pass
    assert len(calls) == during + 1


def test_the_error_of_the_work_gets_through():
    with pytest.raises(ZeroDivisionError), repeatedly(lambda: None):
        _ = 1 / 0
