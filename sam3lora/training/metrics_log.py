"""``metrics.jsonl``: a line for each logged step, epoch and event; and the same values for TensorBoard if asked for.

The training workers are other processes, perhaps on other hosts, so the file is also how their progress reaches the
process that started them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.data.fault_report import fault_summary
from sam3lora.files import errors_of, write_whole
from sam3lora.progress import Progress, repeatedly

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines and flushes each one, so that a progress display in another process can follow."""

    def __init__(self, output_dir: Path, *, after_step: int = 0, tensorboard: bool = False) -> None:
        self._file = output_dir / METRICS_FILE
        self._drop_after(after_step)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=after_step + 1)

    def write(self, kind: str, **values: Any) -> None:
        append_line(self._file, kind, **values)
        if self._writer and "step" in values:
            for name, value in _flat(values):
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, values["step"])
            self._writer.flush()

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far, of earlier attempts too."""
        return read_metrics(self._file)

    def _drop_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run will do again."""
        lines = [line for line in read_metrics(self._file) if line.get("step", 0) <= step] if step else []
        write_whole(self._file, "".join(json.dumps(line) + "\n" for line in lines))


class WarningsToMetrics(logging.Handler):
    """Copies this package's warnings to ``metrics.jsonl``, because nobody sees the output of a worker process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._log: MetricsLog | None = None
        self._early: list[str] = []
        logging.getLogger("sam3lora").addHandler(self)

    def write_to(self, log: MetricsLog) -> None:
        """Write later warnings to the log, and those collected so far."""
        self._log = log
        for message in self._early:
            log.write("warning", message=message)

    def emit(self, record: logging.LogRecord) -> None:
        if self._log:
            self._log.write("warning", message=record.getMessage())
        else:
            self._early.append(record.getMessage())


_SHOWN = ("map", "map_50", "mean_iou", "mean_iou_foreground", "mean_iou_1", "mean_iou_3", "mean_iou_8", "noc_85")


def append_line(file: Path, kind: str, **values: Any) -> None:
    """Append a line, and before it end one that a killed process has left half-written."""
    with errors_of(file), file.open("a+b") as lines:
        if lines.tell() and os.pread(lines.fileno(), 1, lines.tell() - 1) != b"\n":
            lines.write(b"\n")
        line = json.dumps({"kind": kind, **_finite(values), "unix_time": round(time.time(), 3)})
        lines.write(f"{line}\n".encode())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; none if there is no file."""
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # a line that is being written
            continue
    return lines


def memory_mb(device: torch.device) -> float:
    """Peak memory: of the device's allocator, or of this process on a CPU, in megabytes."""
    if device.type == "cuda":
        import torch  # not by the process that starts a run and shows its progress

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _flat(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _finite(value: Any) -> Any:
    """JSON has no NaN, so None stands for a value that could not be computed."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def write_plots(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw ``loss.png`` (training and validation) and ``terms.png`` (each term) from the lines of ``metrics.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in lines if line["kind"] == "step"]
    axis.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="0.8", linewidth=1, label="training, step")
    base = [line for line in lines if line["kind"] == "base" and line["valid_loss"] is not None]
    if base:
        axis.axhline(base[-1]["valid_loss"], color="0.5", linestyle=":", label="validation, base model")
    for key, label, style in (("train_loss", "training", "o-"), ("valid_loss", "validation", "s-")):
        points = [(line["step"], line[key]) for line in epochs if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axis.set(xlabel="step", ylabel="loss", title="Loss")
    axis.grid(alpha=0.3)
    axis.legend()
    written = [folder / "loss.png"]
    figure.savefig(written[0], dpi=130)
    plt.close(figure)

    names = [name for name in epochs[-1]["train_terms"] if not name.endswith("_o2m")]
    columns = 3
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(10, 2.6 * -(-len(names) // columns)), layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for key, label in (("train_terms", "training"), ("valid_terms", "validation")):
            points = [(line["step"], line[key][name]) for line in epochs if line[key].get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    written.append(folder / "terms.png")
    figure.savefig(written[1], dpi=130)
    plt.close(figure)
    return written


@contextlib.contextmanager
def follow(output_dir: Path, style: str) -> Iterator[None]:
    """Show the lines that are appended to the run's metrics while the block runs. Style: auto, bar, lines or off."""
    reader = _NewLines(output_dir / METRICS_FILE)
    best_metric: str | None = None
    with Progress(unit="steps", style=style, note="starting the workers") as progress:

        def look() -> None:
            nonlocal best_metric
            for line in reader.read():
                best_metric = line.get("best_metric", best_metric)  # the line of the start has it
                if line["kind"] == "step" and progress.has_bar:
                    note = f"loss {line['loss']:.4g}, {line['images_per_second']:.1f} images/s"
                    progress.update(line["step"], total=line["total_steps"], note=note)
                elif text := describe_line(line, best_metric):
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


def _shown_metrics(line: dict[str, Any], best_metric: str | None) -> list[str]:
    losses = ("train_loss", "valid_loss")
    names = _SHOWN if best_metric is None or best_metric in (*_SHOWN, *losses) else (*_SHOWN, best_metric)
    return [f"{name} {line[name]:.3f}" for name in names if line.get(name) is not None]


def _asked(line: dict[str, Any]) -> str:
    key = "classes" if "classes" in line else "prompts"
    name = "clicks on" if line.get("task") == "clicks" else f"{key}:"
    return f"{name} {', '.join(line[key][:12])}"


def describe_line(line: dict[str, Any], best_metric: str | None = None) -> str | None:
    """A line of metrics in words, `best_metric` among them; None for one that is not worth showing."""
    kind = line["kind"]
    if kind == "start":
        device, workers = line["device"], line["num_workers"]
        images = f"{line['num_train_images']} training and {line['num_valid_images']} validation images"
        images += f" ({line['no_valid']})" if line.get("no_valid") else ""
        return f"{images}, {workers} worker{'s' * (workers > 1)} on {device}, {_asked(line)}"
    if kind == "faults":
        return fault_summary(line["faults"], line["data_dir"])
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
        return ", ".join(parts + _shown_metrics(line, best_metric))
    if kind == "base":
        valid = line["valid_loss"]
        shown = "not finite" if valid is None else f"{valid:.4g}"
        return ", ".join([f"base: valid loss {shown}", *_shown_metrics(line, best_metric)])
    if kind == "warning":
        return f"warning: {line['message']}"
    if kind == "note":
        return f"note: {line['message']}"
    if kind == "skipped_image":
        return f"skipped image {line['path']}: {line['reason']}"
    if kind == "end" and line.get("num_skipped"):
        num = line["num_skipped"]
        return f"{num} image{'s' * (num > 1)} could not be read and {'were' if num > 1 else 'was'} skipped"
    if kind == "early_stop":
        return f"stopped early: the best loss was {line['best_loss']:.4g} at step {line['best_step']}"
    return None
