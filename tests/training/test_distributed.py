"""Gradients averaged and values gathered. The exchange is replaced; `test_two_workers_equal_one` does it for real."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import Parameter

from sam3lora.training import distributed


@pytest.fixture(autouse=True)
def _another_worker_with_zeros(monkeypatch):
    """Sums over two workers, of which the other has only zeros: the mean is half of what this one has."""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda buffer: None)


def parameters_of(*gradients):
    found = [Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = gradient
    return found


def test_mean_of_gradients_and_extra_values():
    # A plain matrix, one in another order of memory, one in half precision, and a parameter without a gradient.
    gradients = [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(3, 2).T,
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
    ]
    parameters, idle = parameters_of(*[gradient.clone() for gradient in gradients]), Parameter(torch.ones(4))
    mean = distributed.average_gradients([*parameters, idle], torch.tensor([4.0, 8.0]))
    assert mean.tolist() == [2.0, 4.0]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient / 2)
        assert parameter.grad.dtype == gradient.dtype
    assert idle.grad.tolist() == [0.0] * 4


def test_steps_do_not_mix():
    # Each step begins anew: with a fresh gradient, without one, or adding to the mean of the step before.
    [parameter] = parameters_of(torch.tensor([2.0, 4.0]))
    for gradient, mean in (([2.0, 4.0], [1.0, 2.0]), ([8.0, 6.0], [4.0, 3.0]), (None, [0.0, 0.0])):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        assert distributed.average_gradients([parameter], torch.ones(1)).tolist() == [0.5]
        assert parameter.grad.tolist() == mean


def test_one_worker_takes_the_step_of_several(monkeypatch):
    # A parameter has a gradient in the first of three steps only, another in none. All workers hold the same, so that
    # the mean is what each has; AdamW's decay and its count of steps must not depend on how many there are.
    def trained(num_workers: int) -> list[list[float]]:
        monkeypatch.setattr(distributed.dist, "is_initialized", lambda: num_workers > 1)
        monkeypatch.setattr(distributed.dist, "all_reduce", lambda buffer: buffer.mul_(num_workers))
        parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(1))]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        for gradient in (torch.tensor([1.0, -2.0]), None, None):
            parameters[0].grad = gradient
            distributed.average_gradients(parameters, torch.zeros(1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [parameter.tolist() for parameter in parameters]

    alone, together = trained(1), trained(2)
    assert alone == together
    # the idle one decays in each of three steps
    assert alone[1] == pytest.approx([0.95**3])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_first_worker_makes_of_all_values_reaches_the_others(monkeypatch, rank):
    sent = {}

    def gather(value, gathered):
        if gathered is not None:
            gathered[:] = [value, value + 1]

    def broadcast(outcome):
        # the second worker is told what the first has sent before
        outcome[:] = sent.setdefault("outcome", list(outcome))

    monkeypatch.setattr(distributed.dist, "gather_object", gather)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)

    def refuse(values):
        raise ValueError(f"cannot measure {values}")

    for compute in (sum, refuse):
        sent.clear()
        for now in range(rank + 1):
            monkeypatch.setattr(distributed, "rank", lambda now=now: now)
            if compute is sum:
                assert distributed.on_first_worker(3, sum) == 7
            else:
                with pytest.raises(ValueError, match=r"cannot measure \[3, 4\]"):
                    distributed.on_first_worker(3, refuse)


class OfTwo(Exception):
    """An exception that pickles but does not come back: its text is not what it is made of."""

    def __init__(self, value: int, unit: str) -> None:
        super().__init__(f"{value} {unit} is too much")


def test_the_reason_reaches_all_workers_if_the_exception_cannot_be_sent():
    class Local(Exception):
        """One that cannot be pickled at all."""

    for error, told in ((OfTwo(3, "GB"), "OfTwo: 3 GB is too much"), (Local("no space"), "Local: no space")):
        sendable = distributed._as_sendable(error)
        received = pickle.loads(pickle.dumps(sendable))  # noqa: S301 - own bytes
        assert repr(received) == repr(RuntimeError(told))
        assert sendable.__cause__ is error
    kept = ValueError("plain")
    assert distributed._as_sendable(kept) is kept
