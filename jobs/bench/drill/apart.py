"""Drills with two workers without Ray, of which the second may see other files than the first, as on another host."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.drill.namespaces import enter, mounted
from jobs.bench.drill.runs import SETTINGS, Drill, DrillFailed, Run, check_whole, loss_of
from sam3lora.config import load_config
from sam3lora.training.checkpoint_folders import list_checkpoints
from sam3lora.training.metrics_log import METRICS_FILE, read_metrics

SAVED = ("training.max_steps=8", "training.num_epochs=4", "training.lr_scheduler=constant")
LONGER = ("training.max_steps=16", *SAVED[1:])


@dataclass
class Pair:
    """Two workers of one run."""

    runs: tuple[Run, Run]

    def wait(self) -> list[int]:
        return [run.wait() for run in self.runs]


def start_pair(
    drill: Drill,
    name: str,
    *overrides: str,
    folder: Path | None = None,
    prefix: Sequence[str] = (),
    prefixed_rank: int = 1,
) -> Pair:
    """Start both; the words of `prefix` run one of them."""
    folder = folder or drill.scratch / name
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    paths = [f"training.data_dir={drill.data}", f"output.output_dir={folder}"]
    config_file, rendezvous = drill.scratch / f"{name}.yaml", drill.scratch / uuid.uuid4().hex
    config_file.write_text(load_config("quick_test", [*SETTINGS, *overrides, *paths]).to_yaml())
    runs = []
    for rank in (0, 1):
        log = f"{name}_{rank}"
        words = ["-m", "jobs.bench.drill.plain_worker", str(config_file), str(rank), "2", str(rendezvous)]
        process = drill.start(log, [*(prefix if rank == prefixed_rank else ()), sys.executable, *words])
        runs.append(Run(folder, process, drill.scratch / f"{log}.log"))
    return Pair((runs[0], runs[1]))


@contextlib.contextmanager
def other_view(folder: Path, instead: Path) -> Iterator[tuple[list[str], list[str]]]:
    """A view of the files with `instead` in the place of `folder`: words to run a command in it, and to end it.

    Raises:
        DrillFailed: This system allows no mounts in a user namespace.
    """
    with mounted(f"mount --bind '{instead}' '{folder}'") as holder:
        yield enter(holder), [*enter(holder), "umount", "-l", str(folder)]


def sigterm_plain_worker(drill: Drill) -> dict[str, object]:
    """SIGTERM to one of two workers without Ray, and a new start"""
    straight = start_pair(drill, "plain_straight")
    if straight.wait() != [0, 0]:
        raise DrillFailed(straight.runs[0].output()[-800:])
    pair = start_pair(drill, "sigterm_plain_worker")
    fault_s = pair.runs[0].wait_for_step(6)
    pair.runs[1].process.send_signal(signal.SIGTERM)
    statuses, messages = pair.wait(), {run.message() for run in pair.runs}
    if statuses != [143, 143] or len(messages) != 1:
        raise DrillFailed(f"statuses {statuses}, messages {messages}")
    again = start_pair(drill, "sigterm_plain_worker_resumed", folder=pair.runs[0].folder)
    row = {"status": f"{statuses}, {again.wait()}", **loss_of(pair.runs[0], fault_s, again.runs[0])}
    adapter = check_whole(pair.runs[0].folder, straight.runs[0].folder)
    return row | {"adapter": adapter, "message": messages.pop()}


def unequal_data(drill: Drill) -> dict[str, object]:
    """two images are missing on one of two hosts"""
    instead = drill.scratch / "fewer_images"
    shutil.copytree(drill.data / "train", instead)
    for image in sorted(path for path in instead.iterdir() if path.suffix != ".json")[:2]:
        image.unlink()
    with other_view(drill.data / "train", instead) as (inside, _):
        pair = start_pair(drill, "unequal_data", "training.on_bad_image=skip", prefix=inside)
        began = time.time()
        statuses = pair.wait()
    messages = {run.message() for run in pair.runs}
    lines = read_metrics(pair.runs[0].folder / METRICS_FILE)
    if statuses != [2, 2] or len(messages) != 1 or any(line["kind"] == "step" for line in lines):
        raise DrillFailed(f"statuses {statuses}, messages {messages}")
    return {"status": str(statuses), "seconds": time.time() - began, "message": messages.pop()}


def stale_listing(drill: Drill) -> dict[str, object]:
    """one of two hosts sees the newest checkpoint 5 s late"""
    return _stale_for_a_while(drill, "stale_listing", 1)


def stale_first(drill: Drill) -> dict[str, object]:
    """the same on the host of the first worker"""
    return _stale_for_a_while(drill, "stale_first", 0)


def _stale_for_a_while(drill: Drill, name: str, rank: int) -> dict[str, object]:
    reference = start_pair(drill, f"{name}_reference", *LONGER)
    if reference.wait() != [0, 0]:
        raise DrillFailed(reference.runs[0].output()[-800:])
    with _stale(drill, name, rank) as (pair, end):
        time.sleep(5)
        subprocess.run(end, check=True)
        statuses = pair.wait()
    [start] = pair.runs[0].starts()[-1:]
    if statuses != [0, 0] or start["step"] != 8:
        raise DrillFailed(f"statuses {statuses}, from step {start['step']}")
    adapter = check_whole(pair.runs[0].folder, reference.runs[0].folder)
    return {"status": str(statuses), "steps repeated": 0, "adapter": adapter}


def stale_for_good(drill: Drill) -> dict[str, object]:
    """one of two hosts never sees the newest checkpoint"""
    with _stale(drill, "stale_for_good", 1) as (pair, _):
        began = time.time()
        statuses = pair.wait()
    message = pair.runs[1].message()
    if statuses[1] != 2 or statuses[0] == 0 or [line["step"] for line in pair.runs[0].steps()][-1] != 8:
        raise DrillFailed(f"statuses {statuses}: {message}")
    return {"status": str(statuses), "seconds": time.time() - began, "message": message}


@contextlib.contextmanager
def _stale(drill: Drill, name: str, rank: int) -> Iterator[tuple[Pair, list[str]]]:
    """A run that goes on from step 8, of which the worker of this rank sees step 4 only; words that end that."""
    first = start_pair(drill, name, *SAVED)
    if first.wait() != [0, 0]:
        raise DrillFailed(first.runs[0].output()[-800:])
    folder = first.runs[0].folder
    newest = list_checkpoints(folder / "checkpoints")[-1]
    instead = drill.scratch / f"{name}_view"
    shutil.copytree(folder / "checkpoints", instead)
    shutil.rmtree(instead / newest.name)
    with other_view(folder / "checkpoints", instead) as (inside, end):
        pair = start_pair(drill, f"{name}_resumed", *LONGER, folder=folder, prefix=inside, prefixed_rank=rank)
        yield pair, end
