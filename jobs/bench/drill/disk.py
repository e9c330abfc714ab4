"""Drills on a disk that fills up: a small file system in memory, which only the processes of one drill see."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.bench.drill.namespaces import enter, mounted
from jobs.bench.drill.runs import Drill, DrillFailed, check_whole, loss_of
from sam3lora.training.checkpoint_folders import list_checkpoints
from sam3lora.training.metrics_log import METRICS_FILE

SIZE_MB = 24


class SmallDisk:
    """A tmpfs at `folder` in the mount namespace of a process."""

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder, self.enter = folder, enter(holder)
        self.seen_from_here = Path(f"/proc/{holder}/root{folder}")
        self._filler = self.seen_from_here / "filler"

    def fill(self, leave_bytes: int) -> float:
        """Leave so much space; the present time."""
        free = shutil.disk_usage(self.seen_from_here).free
        with self._filler.open("wb") as file:
            file.write(bytes(max(free - leave_bytes, 0)))
        return time.time()

    def make_room(self) -> None:
        self._filler.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """
    Raises:
        DrillFailed: This system allows no mounts in a user namespace.
    """
    folder.mkdir(parents=True)
    with mounted(f"mount -t tmpfs -o size={SIZE_MB}m tmpfs '{folder}'") as holder:
        yield SmallDisk(folder, holder)


def disk_full_checkpoint(drill: Drill) -> dict[str, object]:
    """the disk fills up before a checkpoint, room is made, and --resume"""
    return _disk_full(drill, "disk_full_checkpoint", "checkpoints/step_", lambda checkpoint, adapter: 60_000)


def disk_full_adapter(drill: Drill) -> dict[str, object]:
    """the disk fills up before an adapter, room is made, and --resume"""
    return _disk_full(drill, "disk_full_adapter", "last", lambda checkpoint, adapter: checkpoint + adapter // 2)


def disk_full_metrics(drill: Drill) -> dict[str, object]:
    """the disk fills up before a line of metrics, room is made, and --resume"""
    return _disk_full(drill, "disk_full_metrics", METRICS_FILE, lambda checkpoint, adapter: 0)


def disk_full_report(drill: Drill) -> dict[str, object]:
    """the disk is full when `validate` writes its report, and again with room"""
    with small_disk(drill.scratch / "disk_full_report") as disk:
        output = disk.folder / "report"
        words = [
            *disk.enter,
            sys.executable,
            "-m",
            "sam3lora",
            "validate",
            "--use-base-model",
            "--config",
            "quick_test",
        ]
        words += ["--val-data-dir", str(drill.data / "valid"), "--output", str(output)]

        def validate(name: str) -> tuple[int, str]:
            status = drill.start(name, words).wait()
            return status, (drill.scratch / f"{name}.log").read_text()

        status, text = validate("disk_full_report_before")
        files = {path: path.read_bytes() for path in (disk.seen_from_here / "report").iterdir() if path.is_file()}
        disk.fill(2_000)
        full_status, shown = validate("disk_full_report")
        after = {path: path.read_bytes() for path in files if path.is_file()}
        disk.make_room()
        again, _ = validate("disk_full_report_again")
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    if status or again or full_status != 2 or len(errors) != 1 or str(output) not in errors[0] or "Traceback" in shown:
        raise DrillFailed(f"statuses {status}, {full_status}, {again}; {text[-300:]} {shown[-800:]}")
    if after != files:
        raise DrillFailed("files of the earlier report are gone or changed")
    return {"status": f"{full_status}, {again}", "message": errors[0].removeprefix("error: ")}


def _disk_full(drill: Drill, name: str, named: str, left: Callable[[int, int], int]) -> dict[str, object]:
    """`left` says how many bytes to leave, from the sizes of a checkpoint and of an adapter."""
    reference = drill.reference()
    with small_disk(drill.scratch / name) as disk:
        folder, here = disk.folder / "run", disk.seen_from_here / "run"
        run = drill.train(name, folder=folder, seen=here, prefix=disk.enter)
        run.wait_for_step(9)  # the next checkpoint is that of step 12, in the middle of an epoch
        checkpoint = list_checkpoints(here / "checkpoints")[-1]
        fault_s = disk.fill(left(_size(checkpoint), _size(here / "last")))
        status, message = run.wait(), run.message()
        kept = list_checkpoints(here / "checkpoints")
        if status != 1 or str(folder / named) not in message or checkpoint not in kept:
            raise DrillFailed(f"status {status}, message {message}, checkpoints {kept}")
        disk.make_room()
        resumed = drill.resume(run, folder=folder, prefix=disk.enter)
        row = {"status": f"{status}, {resumed.wait()}", **loss_of(run, fault_s, resumed)}
        return row | {"adapter": check_whole(here, reference), "message": message}


def _size(folder: Path) -> int:
    """Bytes on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
