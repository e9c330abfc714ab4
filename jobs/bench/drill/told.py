"""Drills in which a process is told to end before it is ended."""

from __future__ import annotations

import signal

from jobs.bench.drill.lost import ON_RAY, TWO
from jobs.bench.drill.runs import Drill, DrillFailed, check_whole, loss_of


def sigterm_process(drill: Drill) -> dict[str, object]:
    """SIGTERM to a run without Ray, and --resume"""
    return _stopped_and_resumed(drill, "sigterm_process")


def sigterm_driver(drill: Drill) -> dict[str, object]:
    """SIGTERM to the process that waits for the worker, and --resume"""
    return _stopped_and_resumed(drill, "sigterm_driver", *ON_RAY)


def _stopped_and_resumed(drill: Drill, name: str, *overrides: str) -> dict[str, object]:
    reference = drill.reference(*overrides)
    run = drill.train(name, *overrides)
    fault_s = run.wait_for_step(6)
    run.process.send_signal(signal.SIGTERM)
    status, message = run.wait(), run.message()
    resumed = drill.resume(run, *overrides)
    row = {"status": f"{status}, {resumed.wait()}", **loss_of(run, fault_s, resumed)}
    if status != 143 or row["steps repeated"] != 0:
        raise DrillFailed(f"expected status 143 and no repeated step: {row}")
    return row | {"adapter": check_whole(run.folder, reference), "message": message}


def sigterm_worker(drill: Drill) -> dict[str, object]:
    """SIGTERM to one of two workers"""
    reference = drill.reference(*TWO)
    run = drill.train("sigterm_worker", *TWO)
    fault_s = run.wait_for_step(6)
    run.workers()[1].send_signal(signal.SIGTERM)
    row = {"status": run.wait(), **loss_of(run, fault_s)}
    if row["steps repeated"] != 0:
        raise DrillFailed(f"expected no repeated step: {row}")
    return row | {"adapter": check_whole(run.folder, reference)}
