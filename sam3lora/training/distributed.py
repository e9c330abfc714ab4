"""The collective calls of training; without a process group they do nothing.

The gradients of an adapter take a few megabytes, so workers exchange them in one buffer after the last backward pass of
a step. This allows several backward passes a step (chunks of prompts, accumulation) and parameters without a gradient,
which ``DistributedDataParallel`` supports only with extra settings.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")

_BUFFERS = WeakTensorKeyDictionary()  # key: the first of the parameters


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


def on_first_worker(value: object, compute: Callable[[list], Result]) -> Result:
    """What `compute` makes of every worker's value, in order of rank: the first worker computes, the others are told.

    An exception of `compute` is raised on all workers, so that none waits for the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute([value])
    gathered: list | None = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    outcome: list[Any] = [None, None]
    if gathered is not None:
        try:
            outcome = [compute(gathered), None]
        except Exception as error:
            outcome = [None, _as_sendable(error)]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _as_sendable(error: Exception) -> Exception:
    """The exception, or one with its type and text if it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - own bytes
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.__cause__ = error
        return told
    return error


def take_from_first_worker(parameters: Iterable[Parameter]) -> None:
    """Give parameters of any types the values that they have on the first worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for parameter in parameters:
            values = parameter.detach().contiguous()
            dist.broadcast(values, src=0)
            parameter.copy_(values)


def average_gradients(parameters: Iterable[Parameter], extra: Tensor) -> Tensor:
    """Replace each gradient by its mean over workers, and return the mean of ``extra`` (any 1D float tensor).

    A parameter without a gradient gets a gradient of zero, so that all workers take the same step, which is also that
    of one worker alone: AdamW passes over a parameter without a gradient, but lets one of zero decay and counts the
    step. With several workers, the gradients of float32 parameters are views of one buffer, which the next call
    overwrites.
    """
    parameters = list(parameters)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return extra
    buffer = _buffer_of(parameters, len(extra))
    mean_extra, *pieces = buffer.split([len(extra), *[p.numel() for p in parameters]])
    mean_extra.copy_(extra)
    with torch.no_grad():
        views = [piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)]
        made = [(view, p.grad) for p, view in zip(parameters, views, strict=True) if p.grad is not None]
        if made:
            torch._foreach_copy_([view for view, _ in made], [gradient for _, gradient in made])
        for parameter, view in zip(parameters, views, strict=True):
            if parameter.grad is None:
                view.zero_()
    dist.all_reduce(buffer)
    buffer /= dist.get_world_size()
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view.to(parameter.dtype)
    return mean_extra.clone()


def _buffer_of(parameters: Sequence[Parameter], num_extra: int) -> Tensor:
    """The same memory in every step: allocating 40 MB takes longer than sending them."""
    size = num_extra + sum(p.numel() for p in parameters)
    first = parameters[0]
    buffer = _BUFFERS.get(first)
    if buffer is None or buffer.numel() != size or buffer.device != first.device:
        buffer = _BUFFERS[first] = torch.zeros(size, device=first.device)
    return buffer
