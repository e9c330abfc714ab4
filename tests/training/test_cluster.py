"""Joining a cluster and counting its room; no Ray runs here."""

from __future__ import annotations

import socket
import time

import pytest

from sam3lora import cluster
from sam3lora.cli import main
from sam3lora.errors import UserError


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_unreachable_cluster_is_a_mistake_at_once(closed_port, small_base, scenes, tmp_path, capsys):
    # Left to itself, ray.init waits for many minutes and does not even react to Ctrl-C.
    started = time.monotonic()
    options = ["--data-dir", str(scenes), "--output-dir", str(tmp_path / "run")]
    address = f"127.0.0.1:{closed_port}"
    assert main(["train", "quick_test", *options, f"model.name={small_base}", "--address", address]) == 2
    assert address in capsys.readouterr().err
    assert time.monotonic() - started < 30


def test_no_cluster_to_find_is_a_mistake(monkeypatch):
    import ray

    def find_none(**options):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", find_none)
    with (
        pytest.raises(UserError, match=r"auto.*Could not find any"),
        cluster.ray_session("auto", num_cpus=1),
    ):
        pass


def test_ray_client_is_refused_with_what_to_do():
    with (
        pytest.raises(UserError, match="ray job submit"),
        cluster.ray_session("ray://head:10001", num_cpus=1),
    ):
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


def test_room_respects_strict_placement(make_config, nodes):
    nodes({"CPU": 4}, {"CPU": 2})
    for strategy, most in (("STRICT_PACK", 2), ("STRICT_SPREAD", 2), ("PACK", 3)):
        place = f"scaling.placement_strategy={strategy}"
        check(make_config(place, f"scaling.num_workers={most}", num_workers=1))
        with pytest.raises(UserError, match=f"room for {most}"):
            check(make_config(place, f"scaling.num_workers={most + 1}", num_workers=1))


def test_elastic_run_needs_room_for_its_smallest_size(make_config, nodes):
    nodes({"CPU": 2})
    check(make_config("scaling.num_workers=[1, 4]", num_workers=1))
    with pytest.raises(UserError, match=r"num_workers=2 .*room for 1"):
        check(make_config("scaling.num_workers=[2, 4]", num_workers=1))


def test_missing_gpus_are_named(make_config, nodes):
    nodes({"CPU": 64, "GPU": 1})
    with pytest.raises(UserError, match=r"1 GPU.*room for 1 .*use_gpu=false"):
        check(make_config("scaling.num_workers=2", "scaling.use_gpu=true"), use_gpu=True)


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
