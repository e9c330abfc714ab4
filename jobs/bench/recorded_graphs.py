"""Captured graphs without a GPU: operations are recorded once, and repeated on the same memory as one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.bench.pretend_gpu import DeviceTensor

Block = AbstractContextManager[Any]

READS_A_VALUE = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
)
"""Operations for which the host waits for a value of a GPU."""


class CaptureError(RuntimeError):
    """The capture of a CUDA graph would fail as well."""


class RecordingCapturer:
    """Repeats the operations of a capture on the same memory, as a CUDA graph does: Python makes every choice once.

    A capture refuses what a GPU could not capture, and leaves undefined what it would not have computed.

    Args:
        capturing, replaying: Blocks around every capture and every repetition.

    Attributes:
        num_captures: How many functions were captured.
        num_replays: How many times one of them was repeated.
    """

    def __init__(
        self, *, capturing: Callable[[], Block] = nullcontext, replaying: Callable[[], Block] = nullcontext
    ) -> None:
        self.num_captures = 0
        self.num_replays = 0
        self._capturing = capturing
        self._replaying = replaying

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        record = _Record()
        function()  # the warm-up
        with self._capturing(), record:
            function()
        record.spoil()
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            # Casts were recorded as operations of their own, and so was a backward pass.
            with self._replaying(), torch.autocast("cpu", enabled=False), torch.no_grad():
                record.repeat()

        return replay


class _Record(TorchDispatchMode):
    """The operations inside the block, with the tensors that they made."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, tuple, dict, dict[int, Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        _refuse(func.overloadpacket.__name__, args)
        out = func(*args, **kwargs)
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {
            place: leaf
            for place, leaf in enumerate(tree_leaves(out))
            if isinstance(leaf, Tensor) and _address(leaf) not in given
        }
        if made or func._schema.is_mutable:  # others are views
            self._steps.append((func, args, kwargs, made))
        return out

    @torch.no_grad()
    def spoil(self) -> None:
        """Overwrite everything that was made."""
        for _, _, _, made in self._steps:
            for tensor in made.values():
                with _unseen_by_autograd([tensor]):
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def repeat(self) -> None:
        for func, args, kwargs, made in self._steps:
            with _unseen_by_autograd([*tree_leaves((args, kwargs)), *made.values()]):
                leaves = tree_leaves(func(*args, **kwargs))
                for place, tensor in made.items():
                    tensor.copy_(leaves[place])


def _unseen_by_autograd(leaves: list[Any]) -> Block:
    """Of the tensors among the leaves: a GPU that repeats a graph tells autograd nothing."""
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()}
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors.values()))  # type: ignore[no-any-return]


def _refuse(name: str, args: tuple) -> None:
    if name.startswith(READS_A_VALUE):
        raise CaptureError(f"{name} reads a value")
    if name == "lift_fresh":
        raise CaptureError("a tensor is made of values of the host")
    if name.startswith("index"):
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if masks and name in ("index", "index_put", "index_put_"):
            raise CaptureError(f"{name} reads the values of a mask")


def _address(tensor: Tensor) -> int:
    """Of the memory; a tensor of a pretended GPU holds that of another."""
    return (tensor.inner if isinstance(tensor, DeviceTensor) else tensor).untyped_storage()._cdata
