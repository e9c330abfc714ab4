"""The display of a running sweep: a table of its trials in a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sam3lora.progress import repeatedly
from sam3lora.tune.run.ledger import TRIAL_FILE, Ledger, TrialRecord, best_record, has_value
from sam3lora.tune.run.trial_summary import current_record
from sam3lora.tune.space.search_space import SearchSpace

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0
_MOST_ROWS, _MOST_PARAMETERS = 24, 6
_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "pending": "dim"}
_SHOWN = ("train_loss", "valid_loss", "map", "cgf1", "mean_iou", "mean_iou_3", "noc_85")


@contextlib.contextmanager
def show_progress(space: SearchSpace, ledger: Ledger, style: str, console: Console | None = None) -> Iterator[None]:
    """Show the trials of a sweep while the block runs. No error of the display ends the sweep.

    The style is "bar" (a table of the trials), "lines", "off", or "auto": a table in a terminal and lines elsewhere.
    """
    if style == "off":
        yield
        return
    is_table = style == "bar" or (style == "auto" and sys.stdout.isatty())
    console = console or Console(highlight=False, soft_wrap=not is_table)
    reader = RecordReader(space, ledger)
    if not is_table:
        lines = ProgressLines(space, console, reader.records())
        with repeatedly(lambda: lines.show(reader.records()), seconds=_SECONDS_BETWEEN_LOOKS):
            yield
        return
    rows = max(3, min(_MOST_ROWS, console.height - 6))
    live = Live(console=console, auto_refresh=False)  # Live's own thread would draw outside of `repeatedly`

    def draw() -> None:
        live.update(trial_table(space, reader.records(), most_rows=rows), refresh=True)

    with live, repeatedly(draw, seconds=_SECONDS_BETWEEN_LOOKS):
        yield


class RecordReader:
    """Reads a sweep's records repeatedly; those of trials that have ended only once."""

    def __init__(self, space: SearchSpace, ledger: Ledger) -> None:
        self._space, self._ledger = space, ledger
        self._ended: dict[str, TrialRecord] = {}

    def records(self) -> list[TrialRecord]:
        """The records by number, with what running trials have measured so far. Damaged records are left out."""
        found = []
        for file in sorted(self._ledger.sweep_dir.glob(f"trials/*/{TRIAL_FILE}")):
            name = file.parent.name
            try:
                record = self._ended.get(name) or current_record(file.parent, self._space.search)
            except Exception:
                logger.debug("%s is not shown", file, exc_info=True)
                continue
            if record.has_ended:
                self._ended[name] = record
            found.append(record)
        return found


class ProgressLines:
    """Prints a line when a trial starts, finishes an epoch, and ends; events in `earlier` records are not repeated."""

    def __init__(self, space: SearchSpace, console: Console, earlier: Sequence[TrialRecord] = ()) -> None:
        self._space, self._console = space, console
        self._seen = {r.number: (r.status if r.has_ended else "pending", r.epochs) for r in earlier}
        self._started = time.monotonic()

    def show(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            status, epochs = self._seen.get(record.number, ("pending", 0))
            self._seen[record.number] = (record.status, record.epochs)
            if record.has_ended and status != record.status:
                self._print(describe_end(self._space, record))
            elif record.status == "running":
                if status != "running":
                    self._print(f"trial {record.number} starts [{_settings(self._space, record)}]")
                if record.epochs > epochs:
                    latest = record.history[-1]
                    names = dict.fromkeys((*_SHOWN, self._space.search.metric))
                    shown = [f"{name} {latest[name]:.4g}" for name in names if latest.get(name) is not None]
                    total = self._space.base.training.num_epochs
                    self._print(f"trial {record.number} epoch {record.epochs}/{total}: {', '.join(shown)}")

    def _print(self, text: str) -> None:
        line = " ".join(text.split())  # the reason of a failure may have several lines
        self._console.print(Text(f"{_duration(time.monotonic() - self._started)}  {line}"))


def trial_table(space: SearchSpace, records: Sequence[TrialRecord], *, most_rows: int = _MOST_ROWS) -> Table:
    """The trials as a table: the running ones, then the others by value, as far as there is room."""
    sign = 1 if space.search.mode == "min" else -1
    best, names = best_record(list(records), space.search.mode), list(space.parameters)[:_MOST_PARAMETERS]

    def order(record: TrialRecord) -> tuple[bool, float, int]:
        value = sign * (record.value or 0.0) if has_value(record) else float("inf")
        return record.status != "running", value, record.number

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["trial", "status", space.search.metric, "epoch", *map(_leaf, names), "parameters", "time"]
    for name in columns:  # as Text, because names and labels may hold brackets, which rich takes for markup
        table.add_column(Text(name), justify="left" if name == "status" else "right", no_wrap=name != "status")
    for record in sorted(records, key=order)[:most_rows]:
        status = f"failed: {record.failure}" if record.status == "failed" else record.status
        table.add_row(
            Text(f"{record.number}{' base' if record.is_base else ''}"),
            Text(status, style=_COLOURS[record.status]),
            Text("" if record.value is None else f"{record.value:.4g}"),
            Text(f"{record.epochs}/{space.base.training.num_epochs}"),
            *(Text(space.label(name, record.values[name]) if name in record.values else "") for name in names),
            Text(f"{record.trainable_parameters:,}"),
            Text(_duration(record.seconds)),
            style="bold" if best is not None and record.number == best.number else "",
        )
    counts = {status: sum(record.status == status for record in records) for status in _COLOURS}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    more = f"; {len(records) - most_rows} more rows" if len(records) > most_rows else ""
    table.caption, table.caption_justify = Text(f"{len(records)} of {space.num_trials} trials: {shown}{more}"), "left"
    return table


def describe_end(space: SearchSpace, record: TrialRecord) -> str:
    settings = "base configuration" if record.is_base else _settings(space, record)
    if record.status == "failed":
        return f"trial {record.number} failed ({record.failure}): {record.reason} [{settings}]"
    early = " early" if record.status == "stopped" else ""
    value = "" if record.value is None else f", {space.search.metric} {record.value:.4g} at epoch {record.best_epoch}"
    retried = f", batch_size {record.retries[-1]['batch_size']} after running out of memory" if record.retries else ""
    return f"trial {record.number} {record.status}{early}{value}, {_duration(record.seconds)}{retried} [{settings}]"


def _settings(space: SearchSpace, record: TrialRecord) -> str:
    return ", ".join(f"{_leaf(name)} {space.label(name, value)}" for name, value in record.values.items())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:15."""
    return str(datetime.timedelta(seconds=round(seconds)))
