"""Joining a cluster and counting its room; no Ray runs here."""

from __future__ import annotations

import pytest

from sam3lora import cluster
from sam3lora.errors import UserError


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("auto", "auto.*Could not find any"),
        ("ray://head:10001", "ray job submit"),
        ("http://127.0.0.1:8265", r"ray job submit --address http://127.0.0.1:8265.*HOST:6379"),
    ],
)
def test_cluster_that_cannot_be_joined(address, message, monkeypatch):
    import ray

    def find_none(**options):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", find_none)
    with pytest.raises(UserError, match=message), cluster.ray_session(address, num_cpus=1):
        pass


@pytest.fixture
def nodes(monkeypatch):
    """`nodes({"CPU": 4}, ...)` -> Ray says that it has these nodes."""
    import ray

    def have(*resources, free=None):
        total = {name: sum(node.get(name, 0) for node in resources) for node in resources for name in node}
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in resources])
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(ray, "available_resources", lambda: total if free is None else free)

    return have


def check(config, use_gpu=False):
    cluster.check_room(config, cluster.worker_resources(config, use_gpu=use_gpu))


def test_workers_reserve_the_cpus_of_their_data_tasks(make_config):
    config = make_config(num_workers=3)
    assert cluster.worker_resources(config, use_gpu=False) == {"CPU": 4}
    assert cluster.worker_resources(config, use_gpu=True) == {"CPU": 4, "GPU": 1}
    shared = make_config("scaling.resources_per_worker={CPU: 1, GPU: 0.5}", num_workers=3)
    assert cluster.worker_resources(shared, use_gpu=True) == {"CPU": 1, "GPU": 0.5}


def test_room_counts_whole_workers_node_by_node(make_config, nodes):
    config = make_config("scaling.num_workers=2", num_workers=1)
    nodes({"CPU": 2}, {"CPU": 2})
    check(config)
    # Three CPUs would do for one and a half workers, and no worker spans nodes.
    nodes({"CPU": 3}, {"CPU": 1})
    with pytest.raises(UserError, match=r"room for 1 .*3 CPU; 1 CPU.*resources_per_worker=\{CPU: 1\}"):
        check(config)
    # The advice helps.
    check(make_config("scaling.num_workers=2", "scaling.resources_per_worker={CPU: 1}", num_workers=1))


@pytest.mark.parametrize(
    ("cluster_nodes", "override", "enough", "too_many", "message"),
    [
        # strict placement
        (({"CPU": 4}, {"CPU": 2}), "scaling.placement_strategy=STRICT_PACK", "2", "3", "room for 2"),
        (({"CPU": 4}, {"CPU": 2}), "scaling.placement_strategy=STRICT_SPREAD", "2", "3", "room for 2"),
        (({"CPU": 4}, {"CPU": 2}), "scaling.placement_strategy=PACK", "3", "4", "room for 3"),
        # an elastic run needs room for its smallest size
        (({"CPU": 2},), "scaling.use_gpu=auto", "[1, 4]", "[2, 4]", "num_workers=2 .*room for 1"),
        (({"CPU": 64, "GPU": 1},), "scaling.use_gpu=true", "1", "2", "1 GPU.*room for 1 .*use_gpu=false"),
    ],
)
def test_room_for_workers(cluster_nodes, override, enough, too_many, message, make_config, nodes):
    nodes(*cluster_nodes)
    use_gpu = override == "scaling.use_gpu=true"
    check(make_config(override, f"scaling.num_workers={enough}", num_workers=1), use_gpu)
    with pytest.raises(UserError, match=message):
        check(make_config(override, f"scaling.num_workers={too_many}", num_workers=1), use_gpu)


def test_busy_cluster_is_waited_for_and_said_so(make_config, nodes, caplog):
    nodes({"CPU": 8}, free={"CPU": 1.0})
    check(make_config("scaling.num_workers=2", num_workers=1))
    assert "CPU for 2 workers" in caplog.text


def test_gpu_settings_that_contradict_each_other(make_config, nodes):
    nodes({"CPU": 8})
    assert cluster.choose_gpu(make_config("scaling.use_gpu=auto")) is False
    with pytest.raises(UserError, match=r"0\.5 GPUs.*scaling\.use_gpu=false"):
        cluster.choose_gpu(make_config("scaling.resources_per_worker={GPU: 0.5}"))
    nodes({"CPU": 8, "GPU": 2})
    assert cluster.choose_gpu(make_config("scaling.use_gpu=auto")) is True
