"""Where batches are decoded on a cluster: on the host of the worker, and elsewhere once Ray drains it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from sam3lora.data import pipeline
from sam3lora.data.sample import DecodeSettings

pytestmark = pytest.mark.slow
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": int(1e8)}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_drained_host_has_its_batches_decoded_by_the_others(cluster):
    own, other = (node.node_id for node in cluster.worker_nodes)

    @ray.remote(num_cpus=1, label_selector={"ray.io/node-id": own})
    class Worker:
        def __init__(self) -> None:
            pipeline.decode_batch = lambda *_: ray.get_runtime_context().get_node_id()
            plans = ((0, step, []) for step in range(1000))
            settings = DecodeSettings(names=("gear",))
            self._nodes: Any = pipeline.stream_batches(pa.table({}), plans, settings, other_nodes=[other])

        def read(self, number: int) -> set[str]:
            return {next(self._nodes) for _ in range(number)}

    worker = Worker.remote()
    assert ray.get(worker.read.remote(300), timeout=120) == {own}
    _drain(cluster.address, own)
    ahead = ray.get(worker.read.remote(200), timeout=120)  # also what was decoded before
    assert ahead <= {own, other}
    assert ray.get(worker.read.remote(300), timeout=120) == {other}


def _drain(address: str, node_id: str) -> None:
    words = ["drain-node", "--address", address, "--node-id", node_id, "--deadline-remaining-seconds", "300"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    subprocess.run([str(Path(sys.executable).with_name("ray")), *words, *reason], check=True, capture_output=True)
