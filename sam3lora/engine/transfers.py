"""Copies between the host and a GPU through pinned memory, which the GPU reads and writes by itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pinned(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The values in pinned memory, from which `write` needs no copy on the host; as they are without a GPU."""
    if device.type != "cuda":
        return values
    return torch.from_numpy(np.require(values, requirements="W")).pin_memory().numpy()


def upload(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device; the host goes on while they are copied."""
    on_host = torch.as_tensor(values)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def write(target: Tensor, values: np.ndarray | Tensor) -> None:
    """Write values of the host into a tensor of the device; the host goes on while they are copied."""
    on_host = torch.as_tensor(values)
    if target.device.type == "cuda" and not on_host.is_pinned():
        # Torch keeps the pinned copy until the device has read it.
        on_host = on_host.pin_memory()
    target.copy_(on_host, non_blocking=True)


def download(values: Tensor) -> Tensor:
    """The values on the host, once the device has computed them: here the host waits."""
    if values.device.type != "cuda":
        return values.cpu()
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return on_host
