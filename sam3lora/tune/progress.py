"""A sweep for people while it runs: a table in a terminal, a line for each event in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sam3lora.tune.summary import summarise
from sam3lora.tune.trials import Ledger, TrialRecord, best_record

if TYPE_CHECKING:
    from sam3lora.tune.space import SearchSpace

_SECONDS_BETWEEN_LOOKS = 1.0
_MOST_ROWS, _MOST_PARAMETERS = 24, 6
_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "pending": "dim"}


@contextlib.contextmanager
def show_progress(space: SearchSpace, ledger: Ledger, style: str, console: Console | None = None) -> Iterator[None]:
    """Show the trials of a sweep while the block runs, as its ledger and run folders tell.

    Args:
        space: of the sweep.
        ledger: of the sweep.
        style: "table" (a terminal), "lines", "off", or "auto" for what suits the output.
        console: where; None is standard output.
    """
    if style == "off":
        yield
        return
    if style == "auto":
        style = "table" if sys.stdout.isatty() else "lines"
    console = console or Console(highlight=False, soft_wrap=style == "lines")
    display = _Table(space, console) if style == "table" else _Lines(space, console)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            display.show(current_records(space, ledger))

    with display:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            display.show(current_records(space, ledger))


def current_records(space: SearchSpace, ledger: Ledger) -> list[TrialRecord]:
    """The records, those of running trials with what their run folders tell so far."""
    records = ledger.records()
    for record in records:
        if record.status == "running":
            summarise(record, ledger.folder(record.number), metric=space.search.metric, mode=space.search.mode)
    return records


def trial_table(space: SearchSpace, records: Sequence[TrialRecord], *, most_rows: int = _MOST_ROWS) -> Table:
    """The trials as a table: the running ones, then the others by value, as far as there is room."""
    mode, epochs = space.search.mode, space.base.training.num_epochs
    best = best_record(list(records), mode)
    names = list(space.parameters)[:_MOST_PARAMETERS]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("trial", "status", space.search.metric, "epoch", *(name.rpartition(".")[2] for name in names)):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=name != "status")
    table.add_column("parameters", justify="right")
    table.add_column("time", justify="right")
    ordered = sorted(records, key=lambda record: _rank(record, mode))
    for record in ordered[:most_rows]:
        style = "bold" if best is not None and record.number == best.number else ""
        table.add_row(
            f"{record.number}{' base' if record.is_base else ''}",
            Text(_status(record), style=_COLOURS[record.status]),
            "" if record.value is None else f"{record.value:.4g}",
            f"{record.epochs}/{epochs}",
            *(space.label(name, record.values[name]) for name in names),
            f"{record.trainable_parameters:,}",
            _duration(record.seconds),
            style=style,
        )
    counts = {status: sum(record.status == status for record in records) for status in _COLOURS}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    more = f"; {len(ordered) - most_rows} more rows" if len(ordered) > most_rows else ""
    table.caption = f"{len(records)} of {space.num_trials} trials: {shown}{more}"
    table.caption_justify = "left"
    return table


def describe_end(space: SearchSpace, record: TrialRecord) -> str:
    """One line for a trial that has ended."""
    value = "" if record.value is None else f", {space.search.metric} {record.value:.4g} at epoch {record.best_epoch}"
    settings = "base configuration" if record.is_base else _settings(space, record)
    retried = f", batch_size {record.retries[-1]['batch_size']} after running out of memory" if record.retries else ""
    if record.status == "failed":
        return f"trial {record.number} failed ({record.failure}): {record.reason} [{settings}]"
    early = " early" if record.status == "stopped" else ""
    return f"trial {record.number} {record.status}{early}{value}, {_duration(record.seconds)}{retried} [{settings}]"


def _settings(space: SearchSpace, record: TrialRecord) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {space.label(name, value)}" for name, value in record.values.items())


def _status(record: TrialRecord) -> str:
    return f"failed: {record.failure}" if record.status == "failed" else record.status


def _rank(record: TrialRecord, mode: str) -> tuple[int, float, int]:
    running = 0 if record.status == "running" else 1
    if record.status == "failed" or record.value is None:
        return running, float("inf"), record.number
    return running, record.value if mode == "min" else -record.value, record.number


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Table:
    def __init__(self, space: SearchSpace, console: Console) -> None:
        self._space = space
        self._live = Live(console=console, refresh_per_second=2)

    def __enter__(self) -> _Table:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, records: Sequence[TrialRecord]) -> None:
        rows = max(3, min(_MOST_ROWS, self._live.console.height - 6))
        self._live.update(trial_table(self._space, records, most_rows=rows))


class _Lines:
    """A line when a trial starts, when it reaches an epoch, and when it ends."""

    def __init__(self, space: SearchSpace, console: Console) -> None:
        self._space, self._console = space, console
        self._seen: dict[int, tuple[str, int]] = {}
        self._first = True
        self._started = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            status, epochs = self._seen.get(record.number, ("pending", 0))
            if self._first and record.has_ended:  # of an earlier session
                pass
            elif record.has_ended and status != record.status:
                self._say(describe_end(self._space, record))
            elif record.status == "running":
                if status != "running":
                    self._say(f"trial {record.number} starts [{_settings(self._space, record)}]")
                if record.epochs > epochs:
                    latest = record.history[-1]
                    shown = [f"{name} {latest[name]:.4g}" for name in _SHOWN if latest.get(name) is not None]
                    total = self._space.base.training.num_epochs
                    self._say(f"trial {record.number} epoch {record.epochs}/{total}: {', '.join(shown)}")
            self._seen[record.number] = (record.status, record.epochs)
        self._first = False

    def _say(self, text: str) -> None:
        self._console.print(f"{_duration(time.monotonic() - self._started)}  {text}", markup=False)


_SHOWN = ("train_loss", "valid_loss", "map", "cgf1")
