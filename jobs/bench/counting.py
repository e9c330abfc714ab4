"""Floating-point operations, bytes and memory of tensor programs, counted while they run; fake tensors do as well.

    with FakeTensorMode(), cuda_autocast_types(), OperationCounter() as counter:
        model(inputs)
    counter.total.operations, counter.total.bytes_moved, counter.peak_bytes

Under ``FakeTensorMode`` nothing is computed and no memory is taken: a model of any size can be counted on any machine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Device:
    """What a GPU can do.

    Args:
        peak: Dense bfloat16 operations per second, by the data sheet.
        bandwidth: Bytes per second of its memory, by the data sheet.
        memory_gb: In 10^9 bytes.
        share: Of `peak` that matrix products, convolutions and fused attention are assumed to reach.
        bandwidth_share: Of `bandwidth` that all kernels are assumed to reach.
        launch_s: Seconds that Python takes to start a kernel.
    """

    name: str
    peak: float
    bandwidth: float
    memory_gb: float
    share: float = 0.45
    bandwidth_share: float = 0.8
    launch_s: float = 6e-6


H200 = Device("H200", peak=989e12, bandwidth=4.8e12, memory_gb=141)
CARD_24GB = Device("24 GB card", peak=165e12, bandwidth=1.008e12, memory_gb=24)


@dataclass(frozen=True)
class Tally:
    """Kernels of a piece of work by (operations, bytes read and written)."""

    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def operations(self) -> int:
        """Of matrix products, convolutions and attention; a multiply-add is two."""
        return sum(operations * count for (operations, _), count in self.kernels.items())

    @property
    def bytes_moved(self) -> int:
        """Where every kernel reads its inputs from memory and writes its outputs to it."""
        return sum(moved * count for (_, moved), count in self.kernels.items())

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())

    def seconds(self, device: Device) -> float:
        """The longer of starting all kernels and of running them; each takes the longer of operations and bytes."""
        running = sum(
            count * max(operations / (device.peak * device.share), moved / (device.bandwidth * device.bandwidth_share))
            for (operations, moved), count in self.kernels.items()
        )
        return max(running, self.num_kernels * device.launch_s)


class OperationCounter(TorchDispatchMode):
    """Counts the kernels that run inside, by stage, and the memory of the tensors they make.

    A backward operation belongs to the stage that saved what it reads.

    Args:
        stages: Module -> stage that its forward belongs to, whoever calls it. The rest belongs to the innermost
            `stage` block.

    Attributes:
        by_stage: Stage -> what it took.
        live_by_stage: Stage -> bytes of the tensors made there that somebody still holds.
        live_bytes: Their sum.
        peak_bytes: The largest it has been.
    """

    def __init__(self, stages: Mapping[nn.Module, str] | None = None) -> None:
        super().__init__()
        self.by_stage: dict[str, Tally] = {}
        self.live_by_stage: Counter[str] = Counter()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}
        self._stage = ["other"]
        self._stages = stages or {}
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (self._stage[-1], tensor), self._stage_of_saved
        )

    @property
    def total(self) -> Tally:
        return Tally(sum((tally.kernels for tally in self.by_stage.values()), Counter()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage.append(name)
        try:
            yield
        finally:
            self._stage.pop()

    def __enter__(self) -> OperationCounter:
        for module, name in self._stages.items():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._stage.append(name)),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hooks.__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        known = {_address(tensor) for tensor in inputs}
        made = [tensor for tensor in outputs if _address(tensor) not in known]
        for tensor in made:
            self._track(tensor)
        if (made or func._schema.is_mutable) and not func._schema.name.startswith("aten::empty"):
            formula = flop_registry.get(func._overloadpacket)
            operations = int(formula(*args, **kwargs, out_val=out)) if formula else 0
            moved = sum(_num_bytes(tensor) for tensor in (*inputs, *outputs))
            self.by_stage.setdefault(self._stage[-1], Tally()).kernels[operations, moved] += 1
        return out

    def _track(self, tensor: Tensor) -> None:
        storage, stage, address = tensor.untyped_storage(), self._stage[-1], _address(tensor)
        if address in self._storages:
            return
        size = storage.nbytes()

        def released(_: Any) -> None:
            del self._storages[address]
            self.live_bytes -= size
            self.live_by_stage[stage] -= size

        self._storages[address] = weakref.ref(storage, released)
        self.live_bytes += size
        self.live_by_stage[stage] += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _leave_module(self, *_: Any) -> None:
        self._stage.pop()

    def _stage_of_saved(self, saved: tuple[str, Tensor]) -> Tensor:
        self._stage[-1], tensor = saved
        return tensor


@contextmanager
def cuda_autocast_types() -> Iterator[None]:
    """Lets autocast on a CPU keep the types that it keeps on a GPU, where norms and softmax give float32."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(values.float() if torch.is_autocast_enabled("cpu") else values, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ("layer_norm", "group_norm", "softmax"):
            stack.enter_context(patch.object(F, name, in_float32(getattr(F, name))))
        yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _num_bytes(tensor: Tensor) -> int:
    """That a kernel touches: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
