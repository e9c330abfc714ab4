"""Dropout whose random numbers follow from a key, which is a tensor.

A layer that is computed again in the backward pass needs the numbers of the forward pass. Given the same key it draws
the same ones, so that no state of a random number generator has to be restored, which a CUDA graph could not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

try:
    from torch.func import _random as stateless  # experimental in torch, on CPU and CUDA the same numbers
except ImportError:  # an older torch
    stateless = None  # type: ignore[assignment]


class _Draws:
    """Keys of the draws of a block, one after the other."""

    def __init__(self, key: Tensor) -> None:
        self._key, self._num_drawn = key, 0

    def next_key(self) -> Tensor:
        self._num_drawn += 1
        return stateless.fold_in(self._key, self._num_drawn)


_draws: ContextVar[_Draws | None] = ContextVar("draws", default=None)


def can_draw_by_key() -> bool:
    """Whether this torch has what it takes."""
    return stateless is not None


def new_key(device: torch.device) -> Tensor:
    """A key, which torch's own random number generator of the device draws."""
    key = torch.zeros(2, dtype=torch.int64, device=device)  # seed and offset
    key[:1].random_()
    return key.view(torch.uint64)


@contextmanager
def dropout_from(key: Tensor) -> Iterator[None]:
    """Inside, `dropout` draws from this key; each call draws other numbers."""
    token = _draws.set(_Draws(key))
    try:
        yield
    finally:
        _draws.reset(token)


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The values with a share `p` of them zero and the others divided by 1 - p, and which are kept (bool)."""
    draws = _draws.get()
    if draws is None:
        return torch.native_dropout(x, p, True)
    kept = stateless.uniform(draws.next_key(), x.shape, dtype=torch.float32) >= p
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - p)), kept
