"""Drills on a Ray cluster of several nodes, all on this machine: hosts that are lost, taken away, or come and go."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench.drill.runs import ENVIRONMENT, Drill, DrillFailed, Run, check_whole, loss_of, workers_below

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": int(1e8)}  # room for one worker
TWO_HOSTS = ("scaling.num_workers=2", "scaling.worker_start_timeout_s=20")
ENDLESS = (  # until SIGTERM, and without checkpoints that are due by steps
    "training.num_epochs=1000",
    "training.save_steps=100000",
    "training.eval_steps=100000",
    "training.lr_scheduler=constant",
)
ELASTIC_TOLERANCE = 1e-2
"""Sums of gradients over one worker and over two differ in the last bits, which some hundred steps enlarge."""
DEADLINE_S = 20
"""From a notice until the host is gone: as short as clouds make it."""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Cluster]:
    """A cluster with a head that trains nothing, and so many nodes for workers."""
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": int(1e8), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def _node_with_worker(cluster: Cluster):
    """A node on which a worker trains now."""
    for node in sorted(cluster.worker_nodes, key=lambda node: node.node_id):
        raylet = node.all_processes["raylet"][0].process.pid
        if workers_below(raylet):
            return node
    raise DrillFailed("no worker trains on any node")


def host_lost(drill: Drill) -> dict[str, object]:
    """kill -9 of a host, with a spare one"""
    return _host_ends(drill, "host_lost", graceful=False)


def host_terminated(drill: Drill) -> dict[str, object]:
    """SIGTERM to the Ray of a host, with a spare one"""
    return _host_ends(drill, "host_terminated", graceful=True)


def _host_ends(drill: Drill, name: str, *, graceful: bool) -> dict[str, object]:
    reference = drill.reference("scaling.num_workers=2")
    with hosts(3) as cluster:
        run = drill.train(name, *TWO_HOSTS, options=["--address", cluster.address])
        fault_s = run.wait_for_step(6)
        cluster.remove_node(_node_with_worker(cluster), allow_graceful=graceful)
        status = run.wait()
    return {"status": status, **loss_of(run, fault_s), "adapter": check_whole(run.folder, reference)}


def host_drained(drill: Drill) -> dict[str, object]:
    """a host is drained and gone 20 s later, with a spare one; no other checkpoints"""
    two = ("scaling.num_workers=2", *ENDLESS)
    with hosts(3) as cluster:
        run = drill.train("host_drained", *two, *TWO_HOSTS, options=["--address", cluster.address])
        run.wait_for_step(6)
        node = _node_with_worker(cluster)
        _drain(cluster.address, node.node_id)
        time.sleep(DEADLINE_S)
        cluster.remove_node(node, allow_graceful=False)
        last = _stop_after_restart(run, 2)
        status, message = run.wait(), run.message()
    # Ray may start the workers elsewhere before the host is gone: the run pauses from its last step before that.
    pause_s = run.steps(before=run.starts()[1]["unix_time"])[-1]["unix_time"]
    row = {"status": status, **loss_of(run, pause_s), "message": message}
    reference = drill.reference(*two, f"training.max_steps={last()}")
    return row | {"adapter": check_whole(run.folder, reference, names=("last",))}


def _stop_after_restart(run: Run, number: int) -> Callable[[], int]:
    """SIGTERM five new steps after the start of this number; a function that tells the last step once it has ended."""
    run.wait_until(lambda: len(run.starts()) == number, f"start {number}")
    moment = run.starts()[-1]["unix_time"]
    run.wait_for_step(max(line["step"] for line in run.steps(before=moment)) + 5, after=moment)
    run.process.terminate()
    return lambda: max(line["step"] for line in run.steps())


def _drain(address: str, node_id: str) -> None:
    """What an autoscaler, or a cloud's notice that KubeRay passes on, tells Ray."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"]
    deadline = ["--deadline-remaining-seconds", str(DEADLINE_S)]
    done = subprocess.run([*command, *reason, *deadline], capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise DrillFailed(f"ray drain-node failed: {done.stderr[-500:]}")


def elastic(drill: Drill) -> dict[str, object]:
    """an elastic run gets a second host and loses it again"""
    # The same step on one worker and on two; a small rate, at which differences of the last bits stay small.
    step = ("training.images_per_step=2", "training.learning_rate=1e-4", *ENDLESS)
    often = ("training.save_minutes=0.1", "scaling.num_workers=[1, 2]", "scaling.worker_start_timeout_s=20")
    with hosts(1) as cluster:
        options = ["--address", cluster.address]
        run = drill.train("elastic", *step, *often, options=options)
        run.wait_for_step(6)
        came_s = time.time()
        node = cluster.add_node(**NODE)
        run.wait_until(lambda: len(run.starts()) == 2, "restart with a second worker")
        grown = run.starts()[1]
        run.wait_for_step(grown["step"] + 40, after=grown["unix_time"])
        lost_s = time.time()
        cluster.remove_node(node, allow_graceful=False)
        last = _stop_after_restart(run, 3)
        status, message = run.wait(), run.message()
    workers = [start["num_workers"] for start in run.starts()]
    if workers != [1, 2, 1] or status != 143:
        raise DrillFailed(f"workers {workers}, status {status}: {message}")
    reference = drill.reference(*step, "scaling.num_workers=1", f"training.max_steps={last()}")
    adapter = check_whole(run.folder, reference, names=("last",), tolerance=ELASTIC_TOLERANCE)
    growth, shrinking = loss_of(run, came_s), loss_of(run, lost_s)
    return {"status": status, "message": message, "adapter": adapter} | {
        key: f"{growth[key]:.0f} growing, {shrinking[key]:.0f} shrinking" for key in ("steps repeated", "seconds")
    }
