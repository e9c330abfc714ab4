"""Captured functions with gradients, beside the functions themselves."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from jobs.bench.recorded_graphs import RecordingCapturer
from sam3lora.training.graphs.gradient_graphs import GradientGraphs, GraphedFunction


@pytest.fixture
def capturer():
    return RecordingCapturer()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))


def graphed(layer, capturer, function=None):
    return GraphedFunction(
        "it", function or (lambda x: (layer(x),)), layer.parameters(), GradientGraphs(lambda: capturer)
    )


def gradients_of(layer, function, chunks):
    """Gradients of a step of several chunks, in each of which every output has another weight."""
    for parameter in layer.parameters():
        parameter.grad = None
    of_inputs = []
    for x in chunks:
        x = x.clone().requires_grad_(True)
        (y,) = function(x)
        (y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum().backward()
        of_inputs.append(x.grad)
    return [parameter.grad.clone() for parameter in layer.parameters()] + of_inputs


def test_steps_of_several_chunks_have_the_gradients_of_the_function(layer, capturer):
    run = graphed(layer, capturer)
    for _ in range(4):
        chunks = [torch.randn(5, 3), torch.randn(5, 3), torch.randn(2, 3)]
        expected = gradients_of(layer, lambda x: (layer(x),), chunks)
        for mine, other in zip(gradients_of(layer, run, chunks), expected, strict=True):
            torch.testing.assert_close(mine, other)
    assert capturer.num_captures == 4  # forward and backward for 5 rows and for 2


def test_an_update_of_the_weights_is_seen(layer, capturer):
    run = graphed(layer, capturer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    plain.load_state_dict(layer.state_dict())
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x in torch.randn(5, 5, 3):
        gradients_of(layer, run, [x])
        optimizer.step()
        gradients_of(plain, lambda x: (plain(x),), [x])
        plain_optimizer.step()
    for mine, other in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_add_up_with_those_of_other_functions(layer, capturer):
    run, x = graphed(layer, capturer), torch.randn(5, 3)
    for _ in range(3):
        (single,) = gradients_of(layer, lambda x: (layer(x),), [x])[:1]
        for parameter in layer.parameters():
            parameter.grad = None
        weight = torch.arange(1.0, 11).view(5, 2)
        (layer(x) * weight).sum().backward()  # before
        (run(x)[0] * weight).sum().backward()
        (layer(x) * weight).sum().backward()  # after
        torch.testing.assert_close(layer[0].weight.grad, 3 * single)


def test_random_numbers_are_those_of_the_function(capturer):
    layer = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    run = graphed(layer, capturer)
    for seed in range(4):
        x = torch.randn(5, 3)
        torch.manual_seed(seed)
        expected = gradients_of(layer, lambda x: (layer(x),), [x])
        torch.manual_seed(seed)
        for mine, other in zip(gradients_of(layer, run, [x]), expected, strict=True):
            torch.testing.assert_close(mine, other)
    assert capturer.num_captures == 2


def test_a_capture_leaves_the_random_numbers_of_the_step(layer, capturer):
    run, x = graphed(layer, capturer), torch.randn(5, 3)
    run(x)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(x)
    assert capturer.num_captures == 2
    assert torch.equal(torch.rand(4), expected)


def test_without_gradients_results_stay(layer, capturer):
    run = graphed(layer, capturer)
    with torch.no_grad():
        for _ in range(3):
            one, other = torch.randn(2, 5, 3)
            (first,) = run(one)
            run(other)
            torch.testing.assert_close(first, layer(one))
    assert capturer.num_captures == 1
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_inputs_without_gradients_and_unused_weights(layer, capturer):
    unused = nn.Linear(2, 2)
    both = nn.ModuleList([layer, unused])
    run = graphed(both, capturer, lambda x: (layer(x), x.sum(1)))
    for _ in range(3):
        for parameter in both.parameters():
            parameter.grad = None
        x = torch.randn(5, 3)
        y, plain = run(x)
        assert not plain.requires_grad
        torch.testing.assert_close(plain, x.sum(1))
        y.sum().backward()
        mine = [parameter.grad.clone() for parameter in layer.parameters()]
        for parameter in both.parameters():
            parameter.grad = None
        layer(x).sum().backward()
        torch.testing.assert_close(mine, [parameter.grad for parameter in layer.parameters()])
    assert capturer.num_captures == 2


@pytest.mark.parametrize("how", ["reads a value", "changes its mind"])
def test_what_cannot_be_captured_runs_as_it_is(layer, capturer, caplog, how):
    calls = []

    def function(x):
        calls.append(x)
        if how == "reads a value":
            return (layer(x) * x.max().item(),)
        return (layer(x) * len(calls),)

    run = graphed(layer, capturer, function)
    x = torch.randn(5, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            y = run(x)[0]
            factor = x.max() if how == "reads a value" else len(calls)
            torch.testing.assert_close(y, layer(x) * factor)
    assert len(caplog.records) == 1


def test_a_step_in_the_middle_of_which_is_captured(layer, capturer):
    run, x = graphed(layer, capturer), torch.randn(5, 3)
    expected = gradients_of(layer, lambda x: (layer(x),), [x, x, x])
    for mine, other in zip(gradients_of(layer, run, [x, x, x]), expected, strict=True):  # the second chunk captures
        torch.testing.assert_close(mine, other)


def test_every_function_has_memory_of_its_own(layer):
    # A graph of one may run between forward and backward of another.
    made = []
    graphs = GradientGraphs(lambda: made.append(RecordingCapturer()) or made[-1])
    first, second = (GraphedFunction(name, lambda x: (layer(x),), layer.parameters(), graphs) for name in "ab")
    for _ in range(3):
        x = torch.randn(5, 3)
        for parameter in layer.parameters():
            parameter.grad = None
        (y,), (z,) = first(x), second(2 * x)
        (y.sum() + z.square().sum()).backward()
        mine = [parameter.grad.clone() for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.grad = None
        (layer(x).sum() + layer(2 * x).square().sum()).backward()
        torch.testing.assert_close(mine, [parameter.grad for parameter in layer.parameters()])
    assert [one.num_captures for one in made] == [2, 2]


def test_what_is_forgotten_is_captured_anew(layer, capturer):
    graphs = GradientGraphs(lambda: capturer)
    run = GraphedFunction("it", lambda x: (layer(x),), layer.parameters(), graphs)
    for _ in range(2):
        for _ in range(3):
            chunks = [torch.randn(5, 3)]
            expected = gradients_of(layer, lambda x: (layer(x),), chunks)
            torch.testing.assert_close(gradients_of(layer, run, chunks), expected)
        graphs.forget()
    assert capturer.num_captures == 4


def test_a_shape_without_room_leaves_the_others(layer, capturer, monkeypatch, caplog):
    run, capture = graphed(layer, capturer), capturer.capture

    def with_little_memory(function):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(function)

    monkeypatch.setattr(capturer, "capture", with_little_memory)
    for x in (torch.randn(5, 3), torch.randn(2, 3)):
        for _ in range(3):
            expected = gradients_of(layer, lambda x: (layer(x),), [x])
            torch.testing.assert_close(gradients_of(layer, run, [x]), expected)
    assert capturer.num_captures == 2
    assert len(caplog.records) == 1
