"""The network interface of gloo, by which workers on several hosts exchange counts, metrics and CPU gradients."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_Backend: Any = TorchConfig().backend_cls


class TorchOnRayNetwork(TorchConfig):
    """Process groups whose gloo uses the network by which Ray reaches the host.

    Left alone, gloo takes the address that the host's own name stands for. On Debian and Ubuntu that is 127.0.1.1,
    where no other host finds it: "Gloo connectFullMesh failed ... remote=[127.0.1.1]".
    """

    @property
    def backend_cls(self) -> Any:
        return _OnRayNetwork


class _OnRayNetwork(_Backend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_interface_of_ray)  # before the process group is made
        super().on_start(worker_group, backend_config)


def use_interface_of_ray() -> None:
    """Set the variable that gloo reads, in this process, unless the user has set it."""
    if GLOO_INTERFACE not in os.environ:
        name = interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs())
        if name is not None:
            os.environ[GLOO_INTERFACE] = name


def interface_of(ip: str, addresses: Mapping[str, Iterable[Any]]) -> str | None:
    """The interface that has an address, of those that `psutil.net_if_addrs` found; None if none has it (NAT)."""
    for name, entries in addresses.items():
        for entry in entries:
            # an IPv6 address may carry its interface: fe80::1%eth0
            is_ip = entry.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and entry.address.partition("%")[0] == ip.partition("%")[0]:
                return name
    return None
