"""Gloo's interface: that of Ray's address, set in every worker before the process group is made."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from ray.train.torch import config as torch_config

from sam3lora.training import network
from sam3lora.training.network import (
    GLOO_INTERFACE,
    TorchOnRayNetwork,
    interface_of,
    join_process_group,
    use_interface_of_ray,
)


def addresses(**found: list[tuple[int, str]]):
    return {
        name: [SimpleNamespace(family=family, address=address) for family, address in entries]
        for name, entries in found.items()
    }


V4, V6, MAC = socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_PACKET", -1)


@pytest.mark.parametrize(
    ("ip", "name"),
    [
        ("10.0.0.7", "ib0"),
        ("127.0.0.1", "lo"),
        ("fe80::2", "eth0"),
        ("fe80::2%eth0", "eth0"),
        ("10.0.0.70", None),  # no beginning of an address counts
        ("203.0.113.1", None),  # a public address that the host does not have itself
    ],
)
def test_interface_of_an_address(ip, name):
    found = addresses(
        lo=[(V4, "127.0.0.1"), (V6, "::1")],
        eth0=[(MAC, "02:fc:00:00:00:01"), (V4, "192.0.2.2"), (V6, "fe80::2%eth0")],
        ib0=[(V4, "10.0.0.8"), (V4, "10.0.0.7")],
    )
    assert interface_of(ip, found) == name


def test_a_worker_takes_the_interface_of_rays_address_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses(lo=[(V4, "127.0.0.1")], ib0=[(V4, "10.0.0.7")]))
    monkeypatch.setenv(GLOO_INTERFACE, "eth9")
    use_interface_of_ray()
    assert os.environ[GLOO_INTERFACE] == "eth9"
    monkeypatch.delenv(GLOO_INTERFACE)
    use_interface_of_ray()
    assert os.environ.pop(GLOO_INTERFACE) == "ib0"


class TwoWorkers:
    """A worker group that notes what the controller asks of which rank, and runs nothing."""

    def __init__(self) -> None:
        self.asked = []

    def __len__(self) -> int:
        return 2

    def execute(self, function, *arguments):
        self.asked.append((function.__name__, arguments))

    def execute_single(self, rank, function, *arguments):
        self.asked.append((function.__name__, rank))
        return "10.0.0.7", 29500

    def execute_single_async(self, rank, function, *arguments):
        self.asked.append((function.__name__, rank, arguments))

    def execute_async(self, function, *arguments):
        self.asked.append((function.__name__, arguments))


def test_all_workers_join_at_the_address_of_the_first_one_and_leave(monkeypatch):
    monkeypatch.setattr(network.ray, "get", lambda futures, timeout=None: None)
    workers, config = TwoWorkers(), copy.deepcopy(TorchOnRayNetwork(backend="gloo"))  # Ray Train sends a copy
    config.backend_cls().on_start(workers, config)
    config.backend_cls().on_shutdown(workers, config)
    address = ("10.0.0.7", 29500)
    assert workers.asked == [
        ("start_reading", ()),
        ("finish_imports", ()),  # before the port is chosen, which is then used at once
        ("get_address_and_port", 0),
        ("join_process_group", 0, (address, 0, 2, config)),
        ("join_process_group", 1, (address, 1, 2, config)),
        ("leave_process_group", (True,)),
    ]


def test_a_worker_knows_the_interface_before_it_joins(monkeypatch):
    # What gloo reads must be set when the process group is made, and what torch reads as well.
    seen = {}
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses(ib0=[(V4, "10.0.0.7")]))
    monkeypatch.setattr(torch_config, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(torch_config, "_setup_torch_process_group", lambda *given: seen.update(os.environ, given=given))
    for name in (GLOO_INTERFACE, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    join_process_group(("10.0.0.7", 29500), 1, 2, TorchOnRayNetwork(backend="gloo", timeout_s=60))
    assert (seen[GLOO_INTERFACE], seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("ib0", "10.0.0.7", "29500")
    assert seen["given"] == ("gloo", 1, 2, "env://", 60)
    for name in (GLOO_INTERFACE, "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def test_the_process_that_starts_a_run_imports_no_torch():
    # It would take a second and 400 MB; so would Ray Train's controller, which reads the same modules.
    program = "import sam3lora.training.launch, sam3lora.training.ray_trainer, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
