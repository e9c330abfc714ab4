"""Drills in which a process is gone at once: a worker, or the process that waits for the workers."""

from __future__ import annotations

import signal

from jobs.bench.drill.runs import Drill, check_whole, loss_of

ON_RAY = ("scaling.num_workers=1",)
TWO = ("scaling.num_workers=2",)


def worker_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of one of two workers"""
    reference = drill.reference(*TWO)
    run = drill.train("worker_killed", *TWO)
    fault_s = run.wait_for_step(6)
    run.workers()[0].send_signal(signal.SIGKILL)
    status = run.wait()
    return {"status": status, **loss_of(run, fault_s), "adapter": check_whole(run.folder, reference)}


def driver_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of the process that waits for the worker, and --resume"""
    reference = drill.reference(*ON_RAY)
    run = drill.train("driver_killed", *ON_RAY)
    fault_s = run.wait_for_step(6)
    run.process.send_signal(signal.SIGKILL)
    status = run.wait()
    resumed = drill.resume(run, *ON_RAY)
    return {
        "status": f"{status}, {resumed.wait()}",
        **loss_of(run, fault_s, resumed),
        "adapter": check_whole(run.folder, reference),
    }


def process_killed(drill: Drill) -> dict[str, object]:
    """kill -9 of a run without Ray, and --resume"""
    reference = drill.reference()
    run = drill.train("process_killed")
    fault_s = run.wait_for_step(6)
    run.process.send_signal(signal.SIGKILL)
    status = run.wait()
    resumed = drill.resume(run)
    return {
        "status": f"{status}, {resumed.wait()}",
        **loss_of(run, fault_s, resumed),
        "adapter": check_whole(run.folder, reference),
    }
