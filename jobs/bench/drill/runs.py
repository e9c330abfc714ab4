"""The runs of a drill: processes of `sam3lora train`, watched through the lines that they log."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from sam3lora.data.synth.dataset import write_dataset
from sam3lora.model.adapter.metadata import read_metadata
from sam3lora.training.checkpoint_folders import list_checkpoints
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = (
    "training.max_steps=null",
    "training.num_epochs=3",
    "training.batch_size=1",
    "training.save_steps=4",
    "training.save_minutes=null",
    "training.warmup_steps=4",
    "evaluation.base_loss=false",
    "scaling.num_workers=0",
    "scaling.max_failures=1",
    "logging.plots=false",
    "logging.progress=off",
)
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "TRANSFORMERS_VERBOSITY": "error"}
LONGEST_S = 1800.0  # of one run, on a machine that is busy otherwise
NUM_IMAGES = (8, 2)  # 24 steps of one image in three epochs


class DrillFailed(Exception):
    """A run did not do what it promises."""


@dataclass
class Run:
    """A process that trains, and all lines that it logged, those of repeated steps too."""

    folder: Path
    process: subprocess.Popen[str]
    log: Path
    lines: dict[tuple[str, float], dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while not self._ended.wait(0.03):
            self.read()

    def read(self) -> None:
        for line in read_metrics(self.folder / METRICS_FILE):
            self.lines[line["kind"], line["unix_time"]] = line

    def steps(self, *, after: float = 0.0, before: float = float("inf")) -> list[dict]:
        """Lines of steps that were logged between two times, in order of time."""
        lines = sorted(self.lines.items(), key=lambda item: item[0][1])
        return [line for (kind, moment), line in lines if kind == "step" and after < moment < before]

    def starts(self) -> list[dict]:
        return sorted((line for line in self.lines.values() if line["kind"] == "start"), key=lambda x: x["unix_time"])

    def wait_for_step(self, number: int, *, after: float = 0.0) -> float:
        """Wait until a step of at least this number is logged; the present time."""
        self.wait_until(lambda: any(line["step"] >= number for line in self.steps(after=after)), f"step {number}")
        return time.time()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            if self.process.poll() is not None:
                raise DrillFailed(f"the run ended before {what}: {self.output()[-800:]}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise DrillFailed(f"no {what} after {LONGEST_S:g} s")
            time.sleep(0.02)

    def wait(self) -> int:
        """Wait for the end; the exit status, that of a signal as a shell shows it."""
        try:
            status = self.process.wait(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise DrillFailed(f"the run did not end in {LONGEST_S:g} s") from None
        self._ended.set()
        self._watch.join()
        self.read()
        return status if status >= 0 else 128 - status

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def message(self) -> str:
        """The one message of a run that ended with an error.

        Raises:
            DrillFailed: There is a traceback, or no message.
        """
        found = [line for line in self.output().splitlines() if line.startswith("error: ")]
        if len(found) != 1 or "Traceback" in self.output():
            raise DrillFailed(f"expected one message, got {self.output()[-1500:]}")
        return found[0].removeprefix("error: ")

    def workers(self) -> list[psutil.Process]:
        """Training workers of the Ray that the run started."""
        return workers_below(self.process.pid)


def workers_below(pid: int) -> list[psutil.Process]:
    """Training workers among the processes that this one started."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::RayTrain") or "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Drill:
    """The scratch folder of a drill: its data, its runs, and the undisturbed runs that they are compared with."""

    scratch: Path
    references: dict[tuple[str, ...], Path] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def data(self) -> Path:
        folder = self.scratch / "data"
        if not folder.exists():
            write_dataset(folder, num_train=NUM_IMAGES[0], num_valid=NUM_IMAGES[1], size=112, seed=3, progress=False)
        return folder

    def train(
        self,
        name: str,
        *overrides: str,
        folder: Path | None = None,
        seen: Path | None = None,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> Run:
        """Start `sam3lora train`.

        Args:
            folder: Of the run; one with this name if None.
            seen: Where this process sees that folder.
            prefix: Words that run the command, as those of `nsenter`.
        """
        folder = folder or self.scratch / name
        words = ["train", "quick_test", *SETTINGS, *overrides, *options]
        places = ["--data-dir", str(self.data), "--output-dir", str(folder)]
        command = [*prefix, sys.executable, "-m", "sam3lora", *words, *places]
        return Run(seen or folder, self.start(name, command), self.scratch / f"{name}.log")

    def resume(self, run: Run, *overrides: str, folder: Path | None = None, prefix: Sequence[str] = ()) -> Run:
        """Start the command again with --resume."""
        name, folder = f"{run.log.stem}_resumed", folder or run.folder
        return self.train(name, *overrides, folder=folder, seen=run.folder, options=["--resume"], prefix=prefix)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a process whose output goes into a log of this name."""
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        environment.pop("RAY_ADDRESS", None)
        with (self.scratch / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, text=True
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    def reference(self, *overrides: str) -> Path:
        """The folder of a run with these settings that nothing disturbs."""
        if overrides not in self.references:
            run = self.train(f"reference_{len(self.references)}", *overrides)
            if run.wait() != 0:
                raise DrillFailed(f"the undisturbed run failed: {run.output()[-1500:]}")
            self.references[overrides] = run.folder
        return self.references[overrides]


def loss_of(run: Run, fault_s: float, resumed: Run | None = None) -> dict[str, object]:
    """Steps that were done twice, and seconds from the fault until the first step that was new."""
    after = resumed or run
    restart = next((line for line in after.starts() if line["unix_time"] > fault_s), None)
    if restart is None:
        raise DrillFailed(f"the run was not started again: {after.output()[-500:]}")
    before = max(line["step"] for line in run.steps(before=restart["unix_time"]))
    new = [line for line in after.steps(after=restart["unix_time"]) if line["step"] == before + 1]
    if not new:
        raise DrillFailed(f"no step after {before} was done: {after.output()[-500:]}")
    return {"steps repeated": before - restart["step"], "seconds": new[0]["unix_time"] - fault_s}


def check_steps(folder: Path, last: int) -> None:
    """
    Raises:
        DrillFailed: A step up to `last` is missing in the metrics, or is there twice.
    """
    steps = [line["step"] for line in _step_lines(folder)]
    if steps != list(range(1, last + 1)):
        raise DrillFailed(f"metrics.jsonl has the steps {steps}, expected 1 to {last}, each once")


def _step_lines(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder / METRICS_FILE) if line["kind"] == "step"]


def check_whole(folder: Path, reference: Path, *, names: Sequence[str] = ("last", "best"), tolerance: float = 0) -> str:
    """Compare a finished run with the undisturbed one; in words how close these adapters are.

    `tolerance` bounds the norm of their difference, relative to that of the B matrices, which began at zero; 0 = the
    same to the bit.

    Raises:
        DrillFailed: A step is missing or twice in the metrics, an adapter cannot be loaded or is another one, or
            something is left over.
    """
    check_steps(folder, max(line["step"] for line in _step_lines(reference)))
    off = 0.0
    for name in names:
        if read_metadata(folder / name) is None:
            raise DrillFailed(f"{name} has no metadata")
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (folder, reference))
        if ours.keys() != theirs.keys():
            raise DrillFailed(f"{name} has other weights than that of the undisturbed run")
        squared = sum(float((ours[key].double() - value).square().sum()) for key, value in theirs.items())
        learned = sum(float(value.double().square().sum()) for key, value in theirs.items() if ".lora_B." in key)
        off = max(off, (squared / learned) ** 0.5)
    if off > tolerance:
        raise DrillFailed(f"the adapter is off by {off:.1e}, expected at most {tolerance:g}")
    hidden = [path.name for place in (folder, folder / "checkpoints") for path in place.glob(".*")]
    if [name for name in hidden if name != ".lock"]:
        raise DrillFailed(f"left over: {hidden}")
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        json.loads((checkpoint / "state.json").read_text())
    return "the same to the bit" if off == 0 else f"off by {off:.0e}"
