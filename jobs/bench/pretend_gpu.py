"""A GPU that is not there: tensors that say they are on "cuda:0", computed on the CPU, with every kernel counted.

A program runs whole, with real values, as it would on a GPU: it takes its branches for GPUs, and what it copies between
host and device is seen. What is counted is what does not depend on the GPU: how many kernels a program starts, how many
bytes they read and write, and how often the host waits for a value.

A kernel is an ATen operator on the device that computes or copies. Views and empty allocations are none. Some operators
start several kernels on a GPU (a sort, a cumulative sum, a mean over a large axis), so a count is a lower bound.
Precision under autocast is that of the CPU's lists of operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.models.sam3.modeling_sam3 import Sam3SinePositionEmbedding

DEVICE = torch.device("cuda:0")
_NO_KERNEL = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias", "set_")
_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host waits for their result


class DeviceTensor(Tensor):
    """A tensor that says it is on a GPU. For PyTorch's own code it is on the CPU: that code asks a GPU's driver."""

    inner: Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner!r})"

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a pretended GPU's tensor outside of `pretend_gpu`")


@dataclass
class Launches:
    """What was started: kernels by operator and by part, bytes moved by part, and reads by the host."""

    by_operator: Counter[str] = field(default_factory=Counter)
    by_part: Counter[str] = field(default_factory=Counter)
    bytes_by_part: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    _part: str = "other"
    _paused: int = 0

    @property
    def total(self) -> int:
        return self.by_part.total()

    def add(self, operator: str, num_bytes: int = 0) -> None:
        if not self._paused:
            self.by_operator[operator] += 1
            self.by_part[self._part] += 1
            self.bytes_by_part[self._part] += num_bytes

    def add_read(self, operator: str) -> None:
        if not self._paused:
            self.reads[operator] += 1

    def clear(self) -> None:
        for counter in (self.by_operator, self.by_part, self.bytes_by_part, self.reads):
            counter.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count under this name what runs inside; the innermost name holds."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def as_one(self, operator: str) -> Iterator[None]:
        """Count what runs inside as one launch: the replay of a captured graph."""
        self.add(operator)
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


@contextmanager
def pretend_gpu(*, with_values: bool = True) -> Iterator[Launches]:
    """Inside, "cuda" is a device on which everything can be made and computed; yields what was started there.

    Without values its tensors have shapes alone, on "meta": nothing is computed, and what the host reads is zero.

    Streams, events and pinned memory are there and do nothing. Models and tensors that were made inside can be used
    inside only.
    """
    launches = Launches()
    with ExitStack() as stack:
        for name, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.synchronize": lambda *_: None,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.device": lambda *_: nullcontext(),
            "torch.cuda.Event": lambda **_: _Event(launches),
            "torch.cuda.current_stream": lambda *_: _Event(launches),
            "torch.__future__.get_swap_module_params_on_conversion": lambda: True,
            "torch.optim.Optimizer._accelerator_graph_capture_health_check": lambda self: None,
            "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,
            "torch.inference_mode": lambda mode=True: torch.no_grad() if mode else nullcontext(),
            "torch.random.fork_rng": lambda *_, **__: nullcontext(),
            "torch.autocast": _autocast,
            "torch.is_autocast_enabled": _of_the_cpu(torch.is_autocast_enabled),
            "torch.get_autocast_dtype": _of_the_cpu(torch.get_autocast_dtype),
        }.items():
            stack.enter_context(mock.patch(name, value))
        # transformers keeps these for all models of a device; those of this GPU must not outlive it
        build = Sam3SinePositionEmbedding.build_sine_position_embedding.__wrapped__
        kept = staticmethod(lru_cache(maxsize=4)(build))
        stack.enter_context(mock.patch.object(Sam3SinePositionEmbedding, "build_sine_position_embedding", kept))
        place = torch.device("cpu" if with_values else "meta")
        stack.enter_context(_Kernels(launches, place))
        stack.enter_context(_Transfers(launches, place))
        yield launches


class _Kernels(TorchDispatchMode):
    """Computes operators of device tensors on what they hold, and counts them."""

    def __init__(self, launches: Launches, place: torch.device) -> None:
        super().__init__()
        self._launches, self._place = launches, place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        wrappers = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
        asked = kwargs.get("device") or next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        # PyTorch's own code, such as a backward pass, asks for the CPU where it means the device of an input.
        if not wrappers and not _is_gpu(asked):
            return func(*args, **kwargs)
        if kwargs.pop("pin_memory", None):
            kwargs["pin_memory"] = False
        name = func.__name__.split(".")[0]
        if name in _READS:
            self._launches.add_read(name)
            if name == "_local_scalar_dense" and self._place.type == "meta":
                return torch.zeros((), dtype=args[0].dtype).item()
        result = func(*tree_map(self._inner, args), **tree_map(self._inner, kwargs))
        if _is_kernel(func, name):
            moved = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self._launches.add(name, sum(leaf.numel() * leaf.element_size() for leaf in moved))

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return wrappers.get(id(value)) if id(value) in wrappers else DeviceTensor(value)

        return tree_map(wrapped, result)

    def _inner(self, value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            return value.inner
        if isinstance(value, Tensor) and self._place.type == "meta":
            return value.to(self._place)  # a scalar or an index beside a tensor of the device
        return self._place if isinstance(value, torch.device) else value


def _is_kernel(func: Any, name: str) -> bool:
    if name.startswith(_NO_KERNEL):
        return False
    returns = func._schema.returns
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return not is_view


class _Transfers(TorchFunctionMode):
    """Copies between host and device, which PyTorch decides before any operator is seen."""

    def __init__(self, launches: Launches, place: torch.device) -> None:
        super().__init__()
        self._launches, self._place = launches, place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
            return self._moved(func(*args, **kwargs), DEVICE)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], DeviceTensor):
            assert func is Tensor.tolist, "a tensor on the device has no array"
            return self._moved(args[0], torch.device("cpu")).tolist()
        if func == Tensor.data.__set__ and isinstance(args[0], DeviceTensor):  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.is_pinned:
            return True
        if name in ("empty", "zeros", "empty_like") and kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("non_blocking", None)
        target: torch.device | None
        if func is not Tensor.to:
            target = torch.device("cpu") if func is Tensor.cpu else DEVICE
            return self._moved(tensor, target)
        if args and isinstance(args[0], Tensor):  # like another tensor
            args = (args[0].device, args[0].dtype, *args[1:])
        target = kwargs.pop("device", None)
        rest = []
        for value in args:
            if isinstance(value, torch.device | str):
                target = torch.device(value)
            elif not isinstance(value, bool):  # non_blocking
                rest.append(value)
        if target is not None:
            tensor = self._moved(tensor, torch.device(target))
        return tensor.to(*rest, **kwargs) if rest or kwargs else tensor

    def _moved(self, tensor: Tensor, target: torch.device) -> Tensor:
        if isinstance(tensor, DeviceTensor) == (target.type == "cuda"):
            return tensor
        assert not (tensor.requires_grad and torch.is_grad_enabled()), "a copy to or from the device has no gradient"
        num_bytes = tensor.numel() * tensor.element_size()
        if isinstance(tensor, DeviceTensor):
            self._launches.add("copy_to_host", num_bytes)
            self._launches.add_read("copy_to_host")
            inner = tensor.inner.detach()
            return torch.zeros_like(inner, device="cpu") if inner.is_meta else inner.clone()
        self._launches.add("copy_to_device", num_bytes)
        moved = DeviceTensor(tensor.detach().to(self._place, copy=True))
        return moved.requires_grad_(tensor.requires_grad)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


_cpu_autocast = torch.autocast


def _autocast(device_type: str, **settings: Any) -> Any:
    return _cpu_autocast("cpu", **settings)


def _of_the_cpu(function: Any) -> Any:
    return lambda device_type="cuda": function("cpu")


class _Event:
    """Of a stream that is never behind; to wait for it is to wait for the device."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        self._launches.add_read("event")

    def query(self) -> bool:
        return True
