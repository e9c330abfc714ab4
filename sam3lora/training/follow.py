"""Progress of a training run, read from its ``metrics.jsonl``.

The training workers are other processes, perhaps on other hosts, so the file is how their progress reaches this one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam3lora.progress import Progress, repeatedly
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics


@contextlib.contextmanager
def follow(output_dir: Path, style: str) -> Iterator[None]:
    """Show the lines that are appended to the run's metrics while the block runs. Style: auto, bar, lines or off."""
    reader = _NewLines(output_dir / METRICS_FILE)
    with Progress(unit="steps", style=style, note="starting the workers") as progress:

        def look() -> None:
            for line in reader.read():
                if line["kind"] == "step" and progress.has_bar:
                    note = f"loss {line['loss']:.4g}, {line['images_per_second']:.1f} images/s"
                    progress.update(line["step"], total=line["total_steps"], note=note)
                elif text := describe_line(line):
                    progress.print(text)

        with repeatedly(look):
            yield


class _NewLines:
    """Complete new lines of a growing file, which every attempt of a run replaces by a copy of the lines it keeps.

    Reading begins at an attempt's own ``start`` line, so that the lines a resumed run keeps are not shown again.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._seen, self._attempt = file, 0, self._latest_attempt(file)
        self._inode: int | None = None

    @staticmethod
    def _latest_attempt(file: Path) -> str | None:
        return max((line["time"] for line in read_metrics(file) if line["kind"] == "start"), default=None)

    def read(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        with self._file.open("rb") as handle:
            inode = os.fstat(handle.fileno()).st_ino
            if inode != self._inode:  # another attempt has begun
                attempt, place = self._latest_attempt(self._file), handle.read().rfind(b'{"kind": "start"')
                if attempt == self._attempt or place < 0:
                    return []
                self._inode, self._seen, self._attempt = inode, place, attempt
            handle.seek(self._seen)
            complete, newline, _ = handle.read().rpartition(b"\n")
        self._seen += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]


def describe_line(line: dict[str, Any]) -> str | None:
    """A line of metrics in words; None for one that is not worth showing."""
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
