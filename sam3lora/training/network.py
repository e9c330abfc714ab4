"""The process group of the workers: how they find each other, and gloo's network interface.

Ray Train has the same in `ray.train.torch.TorchConfig`, with which its controller and the process that starts the run
would import torch as well. Here the workers alone do.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

import psutil
import ray.util
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)
from ray.train.v2._internal.util import TrainingFramework

from sam3lora.data.pipeline import warm_up_reading
from sam3lora.start_marks import mark
from sam3lora.training.imports import finish_imports

logger = logging.getLogger(__name__)

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class TorchOnRayNetwork(BackendConfig):
    """Process groups whose gloo uses the network by which Ray reaches the host.

    Left alone, gloo takes the address that the host's own name stands for. On Debian and Ubuntu that is 127.0.1.1,
    where no other host finds it: "Gloo connectFullMesh failed ... remote=[127.0.1.1]".

    Attributes:
        backend: Of `torch.distributed`, such as "gloo" or "cpu:gloo,cuda:nccl".
        timeout_s: Of each collective operation.
    """

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> Any:
        return _TorchBackend

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH


class _TorchBackend(Backend):
    """What Ray Train's controller does when workers start and end."""

    share_cuda_visible_devices = True  # a worker sees the GPUs of all workers on its host, as NCCL expects

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(start_reading)
        # First what takes seconds: between its choice and its use, somebody else could take the port.
        worker_group.execute(finish_imports)
        address = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, join_process_group, address, rank, size, backend_config)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        leaving = worker_group.execute_async(leave_process_group, len(worker_group) > 1)
        timeout_s = float(
            os.environ.get(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        )
        try:
            ray.get(leaving, timeout=timeout_s)
        except GetTimeoutError:
            logger.warning("the workers did not leave their process group within %g s", timeout_s)


def start_reading() -> None:
    """In a worker: start the processes that read data, while torch is imported."""
    mark("training worker")
    Thread(target=warm_up_reading, daemon=True).start()


def join_process_group(address: tuple[str, int], rank: int, size: int, config: TorchOnRayNetwork) -> None:
    """In a worker: wait for the others at the address of the first one, and set what `torchrun` would set."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    use_interface_of_ray()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address[0], str(address[1])
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(config.backend, rank, size, "env://", config.timeout_s)


def leave_process_group(others: bool) -> None:
    """In a worker: end the process group if others wait in it, and free the GPU's unused memory."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=others)


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
