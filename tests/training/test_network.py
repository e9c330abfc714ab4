"""Gloo's interface: that of Ray's address, set in every worker before the process group is made."""

from __future__ import annotations

import copy
import os
import socket
from types import SimpleNamespace

import psutil
import pytest
from ray.train.torch import TorchConfig

from sam3lora.training import network
from sam3lora.training.network import GLOO_INTERFACE, TorchOnRayNetwork, interface_of, use_interface_of_ray


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


def test_workers_are_told_before_the_process_group_is_made(monkeypatch):
    called = []
    config = copy.deepcopy(TorchOnRayNetwork(backend="gloo"))  # Ray Train sends a copy to its controller
    monkeypatch.setattr(TorchConfig().backend_cls, "on_start", lambda *_: called.append("process group"))
    config.backend_cls().on_start(SimpleNamespace(execute=lambda function: called.append(function.__name__)), config)
    assert called == ["use_interface_of_ray", "process group"]
