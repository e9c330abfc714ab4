"""Progress of a run for people: a bar in a terminal, plain lines in a log. It follows ``metrics.jsonl``.

The training workers are other processes, perhaps on other hosts; the file is what they share with the one who waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

_SECONDS_BETWEEN_LOOKS = 0.3


@contextlib.contextmanager
def follow(output_dir: Path, style: str) -> Iterator[None]:
    """Show what is appended to the run's metrics while the block runs. Style: auto, bar, lines or off."""
    if style == "auto":
        style = "bar" if sys.stdout.isatty() else "lines"
    if style == "off":
        yield
        return
    file = output_dir / METRICS_FILE
    display = _Bar() if style == "bar" else _Lines()
    reader = _Tail(file)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            for line in reader.new_lines():
                display.show(line)

    with display:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            for line in reader.new_lines():
                display.show(line)


class _Tail:
    """New complete lines of a file that grows and that every attempt of a run replaces by a copy of what it keeps.

    Lines are shown from the attempt's own ``start`` line on, so that what a resumed run keeps is not shown again.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._seen, self._attempt = file, 0, self._latest_attempt(file)
        self._inode: int | None = None

    @staticmethod
    def _latest_attempt(file: Path) -> str | None:
        return max((line["time"] for line in read_metrics(file) if line["kind"] == "start"), default=None)

    def new_lines(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        with self._file.open("rb") as handle:
            inode = os.fstat(handle.fileno()).st_ino
            if inode != self._inode:
                attempt, place = self._latest_attempt(self._file), handle.read().rfind(b'{"kind": "start"')
                if attempt == self._attempt or place < 0:
                    return []
                self._inode, self._seen, self._attempt = inode, place, attempt
            handle.seek(self._seen)
            complete, newline, _ = handle.read().rpartition(b"\n")
        self._seen += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]


def describe_line(line: dict[str, Any]) -> str | None:
    """One line of metrics in words; None for lines that are of no interest while waiting."""
    kind = line["kind"]
    if kind == "start":
        device, workers = line["device"], line["num_workers"]
        images = f"{line['num_train_images']} training and {line['num_valid_images']} validation images"
        return (
            f"{images}, {workers} worker{'s' * (workers > 1)} on {device}, prompts: {', '.join(line['prompts'][:12])}"
        )
    if kind == "step":
        terms = " ".join(f"{name} {value:.3g}" for name, value in line["terms"].items() if not name.endswith("_o2m"))
        return (
            f"step {line['step']}/{line['total_steps']} loss {line['loss']:.4g} lr {line['lr']:.2e} "
            f"{line['images_per_second']:.1f} images/s {line['memory_mb']:.0f} MB | {terms}"
        )
    if kind == "epoch":
        valid = line.get("valid_loss")
        parts = [f"epoch {line['epoch']}: train loss {line['train_loss']:.4g}"]
        parts += [f"valid loss {valid:.4g}"] if valid is not None else []
        parts += [f"{name} {line[name]:.3f}" for name in ("map", "map_50") if line.get(name) is not None]
        return ", ".join(parts)
    if kind == "base":
        return f"base: valid loss {line['valid_loss']:.4g}"
    if kind == "warning":
        return f"warning: {line['message']}"
    if kind == "skipped_image":
        return f"skipped image {line['path']}: {line['reason']}"
    if kind == "early_stop":
        return f"stopped early: the best loss was {line['best_loss']:.4g} at step {line['best_step']}"
    return None


class _Lines:
    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, line: dict[str, Any]) -> None:
        text = describe_line(line)
        if text:
            self._console.print(text, markup=False)


class _Bar:
    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("starting the workers", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, line: dict[str, Any]) -> None:
        if line["kind"] == "step":
            state = f"loss {line['loss']:.4g}  {line['images_per_second']:.1f} images/s"
            self._progress.update(self._task, description=state, completed=line["step"], total=line["total_steps"])
            return
        text = describe_line(line)
        if text:
            self._progress.console.print(text, markup=False, highlight=False)
