"""Gradients averaged over workers, with the exchange itself replaced: every worker has what this one has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from sam3lora.training import distributed


@pytest.fixture
def two_workers(monkeypatch):
    """Sums over two workers of which the other has nothing but zeros: the mean is half of what this one has."""
    sent = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", sent.append)
    return sent


def parameters_of(*gradients):
    found = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = gradient
    return found


def test_gradients_and_extra_values_travel_in_one_buffer(two_workers):
    matrix = torch.arange(6.0).view(2, 3)
    # a gradient in another order of memory, one in half precision, and none at all
    turned, half = torch.arange(6.0).view(3, 2).T, torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    parameters = parameters_of(matrix.clone(), turned, half)
    idle = Parameter(torch.ones(4))
    mean = distributed.average_gradients([*parameters, idle], torch.tensor([4.0, 8.0]))
    assert len(two_workers) == 1
    assert two_workers[0].numel() == 2 + 6 + 6 + 2 + 4
    assert mean.tolist() == [2.0, 4.0]
    assert torch.equal(parameters[0].grad, matrix / 2)
    assert torch.equal(parameters[1].grad, turned / 2)
    assert torch.equal(parameters[2].grad, half / 2)
    assert parameters[2].grad.dtype == torch.bfloat16
    assert idle.grad.tolist() == [0.0] * 4


def test_the_next_step_uses_the_same_memory_and_nothing_of_the_last(two_workers):
    [parameter] = parameters_of(torch.tensor([2.0, 4.0]))
    for gradient in ([2.0, 4.0], [8.0, 6.0]):
        parameter.grad = torch.tensor(gradient)
        mean = distributed.average_gradients([parameter], torch.ones(1))
        assert parameter.grad.tolist() == [value / 2 for value in gradient]
        assert mean.tolist() == [0.5]
    parameter.grad = None
    distributed.average_gradients([parameter], torch.ones(1))
    assert parameter.grad.tolist() == [0.0, 0.0]
    first, *others = two_workers
    assert all(buffer.data_ptr() == first.data_ptr() for buffer in others)


def test_two_adapters_do_not_share_memory(two_workers):
    first, second = parameters_of(torch.ones(3)), parameters_of(torch.full((3,), 4.0))
    distributed.average_gradients(first, torch.ones(1))
    distributed.average_gradients(second, torch.ones(1))
    assert first[0].grad.tolist() == [0.5] * 3
    assert second[0].grad.tolist() == [2.0] * 3


def test_gradients_that_were_not_cleared_go_on_from_the_mean(two_workers):
    # they are views of the buffer that they are copied into
    [parameter] = parameters_of(torch.tensor([2.0, 4.0]))
    distributed.average_gradients([parameter], torch.ones(1))
    parameter.grad += 1
    distributed.average_gradients([parameter], torch.ones(1))
    assert parameter.grad.tolist() == [1.0, 1.5]
