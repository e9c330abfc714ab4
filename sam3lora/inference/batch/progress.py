"""How far a batch run is: a line that renews itself in a terminal, a line now and then in a log."""

from __future__ import annotations

import datetime
import sys
import time

_SECONDS_BETWEEN_LINES = 10.0


class BatchProgress:
    """Counts images and prints them with images/s and the time that is left.

    Args:
        num_images: Of the whole run.
        num_before: Of these done by earlier starts: they count as done, not for the speed.
        enabled: Whether to print at all.
    """

    def __init__(self, num_images: int, num_before: int, enabled: bool = True) -> None:
        self._num_images, self._num_before, self._enabled = num_images, num_before, enabled
        self._num_new = self._num_bad = 0
        self._printed = float("-inf")
        self._first: tuple[float, int] | None = None
        self._in_place = sys.stdout.isatty()

    def __enter__(self) -> BatchProgress:
        if self._num_before:
            self._print(f"{self._num_before} of {self._num_images} images were finished before\n")
        return self

    def __exit__(self, *error: object) -> None:
        if self._num_new:
            self._print(("\r" if self._in_place else "") + self.line() + "\n")

    def add(self, num_images: int, num_bad: int = 0) -> None:
        self._num_new += num_images
        self._num_bad += num_bad
        self._first = self._first or (time.monotonic(), self._num_new)
        if self._in_place:
            self._print(f"\r{self.line()}")
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._print(self.line() + "\n")

    def line(self) -> str:
        """For example "120/200 images, 3 bad, 4.2 images/s, 0:00:19 left"; speed without the start of the workers."""
        done = self._num_before + self._num_new
        text = f"{done}/{self._num_images} images" + (f", {self._num_bad} bad" if self._num_bad else "")
        since, num_since = self._first or (0.0, 0)
        if self._num_new > num_since:
            speed = (self._num_new - num_since) / (time.monotonic() - since)
            text += (
                f", {speed:.1f} images/s, {datetime.timedelta(seconds=round((self._num_images - done) / speed))} left"
            )
        return text

    def _print(self, text: str) -> None:
        if self._enabled:
            print(text, end="", flush=True)
