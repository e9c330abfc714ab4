"""Drills in which a process is gone at once, a loss is not finite, or two runs want the same folder."""

from __future__ import annotations

import signal

from safetensors.torch import load_file

from jobs.bench.drill.runs import Drill, DrillFailed, check_whole, loss_of
from sam3lora.training.checkpoint_folders import ADAPTER, list_checkpoints

ON_RAY = ("scaling.num_workers=1",)
TWO = ("scaling.num_workers=2",)


def worker_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of one of two workers"""
    return _worker_gets(signal.SIGKILL, drill, "worker_killed")


def worker_hangs(drill: Drill) -> dict[str, object]:
    """one of two workers is stopped (SIGSTOP) and never goes on"""
    return _worker_gets(signal.SIGSTOP, drill, "worker_hangs")


def _worker_gets(number: signal.Signals, drill: Drill, name: str) -> dict[str, object]:
    reference = drill.reference(*TWO)
    run = drill.train(name, *TWO)
    fault_s = run.wait_for_step(6)
    run.workers()[1].send_signal(number)
    status = run.wait()
    return {"status": status, **loss_of(run, fault_s), "adapter": check_whole(run.folder, reference)}


def driver_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of the process that waits for the worker, and --resume"""
    return _killed_and_resumed(drill, "driver_killed", *ON_RAY)


def process_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of a run without Ray, and --resume"""
    return _killed_and_resumed(drill, "process_killed")


def _killed_and_resumed(drill: Drill, name: str, *overrides: str) -> dict[str, object]:
    reference = drill.reference(*overrides)
    run = drill.train(name, *overrides)
    fault_s = run.wait_for_step(6)
    run.process.send_signal(signal.SIGKILL)
    status = run.wait()
    resumed = drill.resume(run, *overrides)
    row = {"status": f"{status}, {resumed.wait()}", **loss_of(run, fault_s, resumed)}
    return row | {"adapter": check_whole(run.folder, reference)}


def not_finite(drill: Drill) -> dict[str, object]:
    """a learning rate at which the loss is NaN after a few steps, two workers"""
    large = ("training.learning_rate=1", "training.warmup_steps=0", "lora.alpha=4096", "training.save_steps=1")
    run = drill.train("not_finite", *TWO, *large)
    status, message = run.wait(), run.message()
    steps = [line["step"] for line in run.steps()]
    checkpoint = list_checkpoints(run.folder / "checkpoints")[-1]
    weights = load_file(checkpoint / ADAPTER)
    if status != 1 or len(run.starts()) != 1 or checkpoint.name != f"step_{steps[-1]:08d}":
        raise DrillFailed(
            f"status {status}, {len(run.starts())} starts, {checkpoint} after step {steps[-1]}: {message}"
        )
    if not all(value.isfinite().all() for value in weights.values()):
        raise DrillFailed("the last checkpoint is not finite")
    return {"status": status, "steps repeated": 0, "message": message}


def two_runs(drill: Drill) -> dict[str, object]:
    """a second run in the same folder, fresh and with --resume"""
    reference = drill.reference()
    run = drill.train("two_runs")
    run.wait_for_step(5)
    others = [drill.resume(run), drill.train("two_runs_fresh", folder=run.folder)]
    statuses = [run.wait(), *(other.wait() for other in others)]
    messages = [other.message() for other in others]
    if statuses != [0, 2, 2]:
        raise DrillFailed(f"statuses {statuses}: {messages}")
    return {"status": str(statuses), "adapter": check_whole(run.folder, reference), "message": messages[0]}
