"""Progress of a long piece of work for people: a bar in a terminal, plain lines in a log.

    with Progress(len(images), "images") as progress:
        for image in images:
            work(image)
            progress.advance()

Where the work happens in other processes, `repeatedly` looks at what they have written and feeds a `Progress`.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

logger = logging.getLogger(__name__)

Style = Literal["auto", "bar", "lines", "off"]

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts pieces of work and shows the count with speed and remaining time.

    Args:
        total: Pieces of the whole work; None while it is unknown.
        unit: Name of a piece, in the plural.
        style: "bar"; "lines", a line every few seconds; "off"; or "auto", a bar in a terminal and lines elsewhere.
        done_before: Pieces that an earlier start finished. They count as done, but not for the speed.
        note: Shown behind the count until `update` or `advance` gives another.
        stderr: Write to standard error, for commands whose standard output is a result.
        transient: Remove the bar at the end.
    """

    def __init__(
        self,
        total: int | None = None,
        unit: str = "images",
        *,
        style: Style | str = "auto",
        done_before: int = 0,
        note: str = "",
        stderr: bool = False,
        transient: bool = False,
    ) -> None:
        self.console = Console(stderr=stderr, highlight=False)
        if style == "auto":
            style = "bar" if self.console.is_terminal else "lines"
        self._total, self._unit, self._style = total, unit, style
        self._done_before = self._done = done_before
        self._note = note
        self._first: tuple[float, int] | None = None  # time and count of the first update: the start does not count
        self._last_line_s, self._printed = float("-inf"), done_before  # when the last line was written, and its count
        self._bar: RichProgress | None = None
        if style == "bar":
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False), BarColumn(), console=self.console, transient=transient
            )
            self._task = self._bar.add_task(self.text(), total=total, completed=done_before)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        if self._done_before:
            self.print(f"{self._done_before} of {self._total} {self._unit} were finished before")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._style == "lines" and self._printed != self._done:
            self.print(self.text())

    def advance(self, num: int = 1, *, note: str | None = None) -> None:
        """Count pieces as done.

        Args:
            num: How many.
            note: Shown behind the count from now on, such as "3 bad".
        """
        self.update(self._done + num, note=note)

    def update(self, done: int, *, total: int | None = None, note: str | None = None) -> None:
        """Set the number of pieces done so far, and the total and the note where given."""
        self._done = done
        self._total = self._total if total is None else total
        self._note = self._note if note is None else note
        self._first = self._first or (time.monotonic(), done)
        if self._bar:
            self._bar.update(self._task, description=self.text(), completed=done, total=self._total)
        elif self._style == "lines" and time.monotonic() - self._last_line_s > SECONDS_BETWEEN_LINES:
            self._last_line_s, self._printed = time.monotonic(), done
            self.print(self.text())

    def print(self, text: str) -> None:
        """Write a line above the bar, or into the log."""
        if self._style != "off":
            self.console.print(Text(text), soft_wrap=not self._bar)  # as Text: brackets are no markup

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def text(self) -> str:
        """For example "120/200 images, 3 bad, 4.2 images/s, 0:00:19 left"."""
        parts = [f"{self._done}/{'?' if self._total is None else self._total} {self._unit}"]
        parts += [self._note] if self._note else []
        if self._first and self._done > self._first[1]:
            since, num_since = self._first
            speed = (self._done - num_since) / max(time.monotonic() - since, 1e-9)
            parts.append(f"{speed:.1f} {self._unit}/s")
            if self._total is not None:
                parts.append(f"{datetime.timedelta(seconds=round((self._total - self._done) / speed))} left")
        return ", ".join(parts)


@contextlib.contextmanager
def repeatedly(look: Callable[[], object], *, seconds: float = 0.3) -> Iterator[None]:
    """Call `look` every few seconds on a thread while the block runs, and once more after it.

    An exception in `look` is logged at level DEBUG and does not reach the block: a display never ends the work.
    """
    stop = threading.Event()

    def look_once() -> None:
        try:
            look()
        except Exception:
            logger.debug("the progress cannot be shown", exc_info=True)

    def watch() -> None:
        while not stop.wait(seconds):
            look_once()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look_once()
