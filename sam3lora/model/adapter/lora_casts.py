"""Copies of LoRA matrices in the type of the products: those of one call, or of all layers of a model at once.

Shapes: `n` layers of one input, `r` the rank, `R` the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Stacked = tuple[Tensor, Tensor | list[Tensor]]
"""A of all layers (R, in), and B of all layers, (n, out, r) where they are of one shape, else each (out, r)."""


@dataclass(frozen=True)
class AdapterCopies:
    """Copies of one layer's matrices, with the graph to the originals, and their places in the memory of all copies."""

    a_b: tuple[Tensor, Tensor]
    all_a: Tensor
    all_b: Tensor
    start_a: int
    start_b: int

    @property
    def dtype(self) -> torch.dtype:
        return self.all_a.dtype


def copy_adapters(weights: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[AdapterCopies]:
    """Copies of every layer's A (r, in) and B (out, r) by one kernel; their gradients are cast back by one."""
    copies = _Copies.apply(dtype, *[a for a, _ in weights], *[b for _, b in weights])  # type: ignore[no-untyped-call]
    all_a, all_b, *parts = copies
    made, start_a, start_b = [], 0, 0
    for a, b in zip(parts[: len(weights)], parts[len(weights) :], strict=True):
        made.append(AdapterCopies((a, b), all_a, all_b, start_a, start_b))
        start_a, start_b = start_a + a.numel(), start_b + b.numel()
    return made


def stacked_copies(copies: Sequence[AdapterCopies]) -> Stacked | None:
    """The copies of layers as one A and one B, without copying them; None unless they lie one after the other."""
    first, (first_a, first_b) = copies[0], copies[0].a_b
    is_row = all(
        one.all_a is first.all_a
        and (one.a_b[0].shape, one.a_b[1].shape) == (first_a.shape, first_b.shape)
        and one.start_a == first.start_a + number * first_a.numel()
        for number, one in enumerate(copies)
    )
    if not is_row:
        return None
    a = first.all_a[first.start_a : first.start_a + len(copies) * first_a.numel()]
    b = first.all_b[first.start_b : first.start_b + len(copies) * first_b.numel()]
    return a.view(-1, first_a.shape[1]), b.view(len(copies), *first_b.shape)


def cast_and_stack(a_ri: Sequence[Tensor], b_or: Sequence[Tensor], dtype: torch.dtype) -> Stacked:
    """The matrices of layers as one A and one B of this type; a cast is one kernel."""
    is_one_shape = len({b.shape for b in b_or}) == 1
    if all(one.dtype == dtype for one in (*a_ri, *b_or)):
        if len(a_ri) == 1:
            return a_ri[0], list(b_or)
        return torch.cat(list(a_ri)), torch.stack(list(b_or)) if is_one_shape else list(b_or)
    all_a = torch.empty(sum(map(len, a_ri)), a_ri[0].shape[1], dtype=dtype, device=a_ri[0].device)
    if is_one_shape:
        all_b: Tensor | list[Tensor] = torch.empty(len(b_or), *b_or[0].shape, dtype=dtype, device=b_or[0].device)
    else:
        all_b = [torch.empty_like(b, dtype=dtype) for b in b_or]
    torch._foreach_copy_([*all_a.split([len(a) for a in a_ri]), *all_b], [*a_ri, *b_or])
    return all_a, all_b


def cast_each(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in this type, by one kernel."""
    if all(value.dtype == dtype for value in values):
        return list(values)
    made = [torch.empty_like(value, dtype=dtype) for value in values]
    torch._foreach_copy_(made, list(values))
    return made


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.type_of_weights = weights[0].dtype
        halves = (weights[: len(weights) // 2], weights[len(weights) // 2 :])
        sizes = [[one.numel() for one in half] for half in halves]
        buffers = [torch.empty(sum(size), dtype=dtype, device=weights[0].device) for size in sizes]
        ctx.mark_non_differentiable(*buffers)
        parts = [
            part.view(one.shape)
            for buffer, size, half in zip(buffers, sizes, halves, strict=True)
            for part, one in zip(buffer.split(size), half, strict=True)
        ]
        torch._foreach_copy_(parts, list(weights))
        return (*buffers, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made: list[Tensor | None] = list(gradients[2:])
        places = [place for place, gradient in enumerate(made) if gradient is not None]
        cast = cast_each([gradient for gradient in made if gradient is not None], ctx.type_of_weights)
        for place, gradient in zip(places, cast, strict=True):
            made[place] = gradient
        return (None, *made)
