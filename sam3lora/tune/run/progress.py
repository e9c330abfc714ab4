"""A sweep for people while it runs: a table in a terminal, a line for each event in a log.

No fault of the display, nor of a record that it cannot read, ends the sweep or shows up in its output.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sam3lora.tune.run.ledger import TRIAL_FILE, Ledger, TrialRecord, best_record, read_record
from sam3lora.tune.run.trial_summary import summarise

if TYPE_CHECKING:
    from sam3lora.tune.space.reader import SearchSpace

logger = logging.getLogger(__name__)

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
    reader = RecordReader(space, ledger)
    console = console or Console(highlight=False, soft_wrap=style == "lines")
    display = _Table(space, console) if style == "table" else _Lines(space, console)
    stop = threading.Event()

    def show() -> None:
        with _without_harm():
            display.show(reader.records())

    def watch() -> None:
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            show()

    with _without_harm():
        display.start(reader.records())
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        show()
        with _without_harm():
            display.stop()


@contextlib.contextmanager
def _without_harm() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.debug("the progress of the sweep cannot be shown", exc_info=True)


class RecordReader:
    """Reads a sweep's records again and again: those of trials that have ended only when their files change.

    Args:
        space: of the sweep.
        ledger: of the sweep.
    """

    def __init__(self, space: SearchSpace, ledger: Ledger) -> None:
        self._space, self._ledger = space, ledger
        self._ended: dict[str, tuple[tuple[int, int], TrialRecord]] = {}

    def records(self) -> list[TrialRecord]:
        """The records by number, those of running trials with what their run folders tell so far.

        One that cannot be read is left out.
        """
        found = []
        for folder in sorted(self._ledger.folder(0).parent.glob("*")):
            try:
                found.append(self._read(folder))
            except FileNotFoundError:
                continue
            except Exception:
                logger.debug("%s is not shown", folder, exc_info=True)
        return found

    def _read(self, folder: Path) -> TrialRecord:
        found = (folder / TRIAL_FILE).stat()
        state = (found.st_mtime_ns, found.st_size)
        known = self._ended.get(folder.name)
        if known is not None and known[0] == state:
            return known[1]
        record = read_record(folder)
        if record.has_ended:
            self._ended[folder.name] = (state, record)
        elif record.status == "running":
            summarise(record, folder, metric=self._space.search.metric, mode=self._space.search.mode)
        return record


def trial_table(space: SearchSpace, records: Sequence[TrialRecord], *, most_rows: int = _MOST_ROWS) -> Table:
    """The trials as a table: the running ones, then the others by value, as far as there is room."""
    mode, epochs = space.search.mode, space.base.training.num_epochs
    best = best_record(list(records), mode)
    names = list(space.parameters)[:_MOST_PARAMETERS]
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["trial", "status", space.search.metric, "epoch", *map(_leaf, names), "parameters", "time"]
    for name in columns:  # as Text: brackets in names and labels are no markup
        table.add_column(Text(name), justify="left" if name == "status" else "right", no_wrap=name != "status")
    ordered = sorted(records, key=lambda record: _rank(record, mode))
    for record in ordered[:most_rows]:
        style = "bold" if best is not None and record.number == best.number else ""
        table.add_row(
            Text(f"{record.number}{' base' if record.is_base else ''}"),
            Text(_status(record), style=_COLOURS[record.status]),
            Text("" if record.value is None else f"{record.value:.4g}"),
            Text(f"{record.epochs}/{epochs}"),
            *(Text(_label(space, record, name)) for name in names),
            Text(f"{record.trainable_parameters:,}"),
            Text(_duration(record.seconds)),
            style=style,
        )
    counts = {status: sum(record.status == status for record in records) for status in _COLOURS}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    more = f"; {len(ordered) - most_rows} more rows" if len(ordered) > most_rows else ""
    table.caption = Text(f"{len(records)} of {space.num_trials} trials: {shown}{more}")
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
    return ", ".join(f"{_leaf(name)} {_label(space, record, name)}" for name in record.values)


def _label(space: SearchSpace, record: TrialRecord, name: str) -> str:
    return space.label(name, record.values[name]) if name in record.values else ""


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


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
        self._live = Live(console=console, auto_refresh=False)  # else a thread of its own draws, and may fail

    def start(self, records: Sequence[TrialRecord]) -> None:
        self._live.start()
        self.show(records)

    def stop(self) -> None:
        self._live.stop()

    def show(self, records: Sequence[TrialRecord]) -> None:
        rows = max(3, min(_MOST_ROWS, self._live.console.height - 6))
        self._live.update(trial_table(self._space, records, most_rows=rows), refresh=True)


class _Lines:
    """A line when a trial starts, when it reaches an epoch, and when it ends."""

    def __init__(self, space: SearchSpace, console: Console) -> None:
        self._space, self._console = space, console
        self._seen: dict[int, tuple[str, int]] = {}
        self._started = time.monotonic()

    def start(self, records: Sequence[TrialRecord]) -> None:
        """What earlier sessions of the sweep did is not told again."""
        self._seen = {r.number: (r.status if r.has_ended else "pending", r.epochs) for r in records}

    def stop(self) -> None:
        return None

    def show(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            status, epochs = self._seen.get(record.number, ("pending", 0))
            self._seen[record.number] = (record.status, record.epochs)
            if record.has_ended and status != record.status:
                self._say(describe_end(self._space, record))
            elif record.status == "running":
                if status != "running":
                    self._say(f"trial {record.number} starts [{_settings(self._space, record)}]")
                if record.epochs > epochs:
                    latest = record.history[-1]
                    shown = [f"{name} {latest[name]:.4g}" for name in _SHOWN if latest.get(name) is not None]
                    total = self._space.base.training.num_epochs
                    self._say(f"trial {record.number} epoch {record.epochs}/{total}: {', '.join(shown)}")

    def _say(self, text: str) -> None:
        line = " ".join(text.split())  # messages of failures may have several
        self._console.print(Text(f"{_duration(time.monotonic() - self._started)}  {line}"))


_SHOWN = ("train_loss", "valid_loss", "map", "cgf1")
