"""The most memory that the tensors of a program take at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block and still alive; the allocator may hold more.

    Args:
        device: Of the tensors that count; None counts all.

    Attributes:
        live_bytes: Of the tensors that are alive now.
        peak_bytes: The largest that `live_bytes` has been.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    def forget_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_address(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_iter(out):
            if not isinstance(leaf, Tensor) or self._device not in (None, leaf.device):
                continue
            if _address(leaf) not in known and _address(leaf) not in self._storages:
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        size = storage.nbytes()

        def released(_: Any) -> None:
            del self._storages[address]
            self.live_bytes -= size

        self._storages[address] = weakref.ref(storage, released)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
