"""The few collective calls that training needs; without a process group they do nothing.

Gradients of an adapter are a few megabytes, so they travel in one buffer after the last backward pass of a step. That
allows several backward passes a step (chunks of prompts, accumulation) and parameters without a gradient, neither of
which ``DistributedDataParallel`` takes without further measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum of the tensor over all workers, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: object) -> list:
    """Every worker's value, in order of rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def average_gradients(parameters: Iterable[Parameter], extra: Tensor) -> Tensor:
    """Replace each gradient by its mean over workers, and return the mean of ``extra`` (any 1D float tensor).

    A parameter without a gradient counts as zero, so that all workers step alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return extra
    parameters = list(parameters)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    buffer = torch.cat([extra.float(), *[gradient.float().flatten() for gradient in gradients]])
    dist.all_reduce(buffer)
    buffer /= dist.get_world_size()
    pieces = buffer.split([len(extra), *[p.numel() for p in parameters]])
    for parameter, piece in zip(parameters, pieces[1:], strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    return pieces[0].clone()


def same_on_all_workers(values: Sequence[float]) -> bool:
    """Whether every worker passed the same numbers."""
    return all(other == list(values) for other in gather_objects(list(values)))
