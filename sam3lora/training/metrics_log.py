"""``metrics.jsonl``: a line for each logged step, epoch and event; and the same values for TensorBoard if asked for."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from sam3lora.files import write_whole

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
        with self._file.open("a") as file:
            file.write(json.dumps({"kind": kind, **_finite(values), "unix_time": round(time.time(), 3)}) + "\n")
        if self._writer and "step" in values:
            for name, value in _flat(values):
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, values["step"])
            self._writer.flush()

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
