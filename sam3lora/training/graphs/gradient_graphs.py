"""Functions with their gradients as graphs: the forward pass is captured once, and the backward pass after it.

In the backward pass the gradients of the weights add up, so that the chunks of a step are summed inside the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sam3lora.engine.device import is_out_of_memory
from sam3lora.engine.graphs.capture import Capturer, CudaCapturer

logger = logging.getLogger(__name__)

MAX_SHAPES = 4
"""Of one function: each keeps the memory that its forward pass leaves for its backward pass."""

TOLERANCE = 0.05
"""Of the check after a capture, relative to the largest value: bfloat16 sums in another order."""

Tensors = tuple[Tensor, ...]


class GradientGraphs:
    """Captures functions of tensors together with their gradients.

    The gradients of the weights are tensors whose memory stays. A step may set `Parameter.grad` to None or to another
    tensor: the next backward pass starts from what it finds there.
    """

    def __init__(self, make_capturer: Callable[[], Capturer]) -> None:
        # Each function has a capturer, and so memory, of its own: what a forward pass leaves for its backward pass must
        # not lie where a graph of another function, which may run in between, puts its intermediate tensors.
        self.make_capturer = make_capturer
        self.functions: list[GraphedFunction] = []
        self.are_wanted = True
        self._gradients: dict[Parameter, Tensor] = {}

    def forget(self) -> None:
        """Drop all graphs and their memory, and what is known of shapes."""
        for function in self.functions:
            function.forget()

    def give_up(self) -> bool:
        """Drop all graphs and capture no more; False if that was so already."""
        were_wanted, self.are_wanted = self.are_wanted, False
        self.forget()
        return were_wanted

    def begin(self) -> None:
        """Before the first backward pass of a batch, so that no other stream adds to what is replaced here."""
        self.gradients(list(self._gradients))

    def gradients(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """The tensors in which the gradients of these parameters add up, made `Parameter.grad` with its value."""
        new = []
        for parameter in parameters:
            kept = self._gradients.get(parameter)
            if kept is None:
                kept = self._gradients[parameter] = torch.zeros_like(parameter, requires_grad=False)
            if parameter.grad is not kept:
                new.append((parameter, kept))
        with torch.no_grad():
            if empty := [kept for parameter, kept in new if parameter.grad is None]:
                torch._foreach_zero_(empty)
            for parameter, kept in new:
                if parameter.grad is not None:
                    kept.copy_(parameter.grad)
                parameter.grad = kept
        return [self._gradients[parameter] for parameter in parameters]


def cuda_gradient_graphs(device: torch.device) -> GradientGraphs:
    """Graphs of a GPU."""
    # Gradients add up on the stream of a capture, whatever ran a weight's backward pass before.
    torch.autograd.graph.set_override_stale_capture_stream(True)
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    return GradientGraphs(lambda: CudaCapturer(device))


class GraphedFunction:
    """A function of tensors, whose shapes recur, and of the weights of a model.

    A shape that is met for the first time runs as it is; at the second time it is captured, and the capture is compared
    with the function once. Where that fails the function runs as it is from then on. The results are read before the
    next call; with gradients, the backward pass comes before it too.

    Args:
        function: Its results depend on its arguments and the weights only. It reads no value on the host.
        parameters: The weights that learn.
    """

    def __init__(
        self, name: str, function: Callable[..., Tensors], parameters: Iterable[Parameter], graphs: GradientGraphs
    ) -> None:
        self.name = name
        self._function, self._graphs, self._capturer = function, graphs, graphs.make_capturer()
        graphs.functions.append(self)
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._seen: set[tuple] = set()
        self._captured: dict[tuple, _Captured] = {}
        self._refused: set[tuple] = set()  # shapes for whose graphs the memory did not suffice
        self._may_capture = True

    def forget(self) -> None:
        for kept in (self._seen, self._captured, self._refused):
            kept.clear()
        self._capturer = self._graphs.make_capturer()

    def __call__(self, *inputs: Tensor) -> Tensors:
        learns = torch.is_grad_enabled() and (bool(self._parameters) or any(one.requires_grad for one in inputs))
        key = (learns, *((one.shape, one.dtype, learns and one.requires_grad) for one in inputs))
        may_capture = self._may_capture and self._graphs.are_wanted and len(self._captured) < MAX_SHAPES
        if may_capture and key in self._seen and key not in self._captured and key not in self._refused:
            self._capture(key, inputs, learns)
        self._seen.add(key)
        captured = self._captured.get(key)
        if captured is None:
            return self._function(*inputs)
        if not learns:
            outputs = captured.forward(inputs)
            copies = tuple(torch.empty_like(output) for output in outputs)
            _copy_all(copies, outputs)
            return copies
        anchor = torch.empty(0, device=inputs[0].device, requires_grad=True)
        return _Replay.apply(captured, anchor, *inputs)  # type: ignore[no-any-return]

    def _capture(self, key: tuple, inputs: Tensors, learns: bool) -> None:
        device = inputs[0].device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                parameters = self._parameters if learns else []
                captured = _Captured(self._function, inputs, parameters, self._graphs, self._capturer, learns)
                captured.check(inputs)
            self._captured[key] = captured
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if is_out_of_memory(error):
                self._refused.add(key)
                reason = f"out of memory for {len(inputs[0])} at a time"
            else:
                self._may_capture = False
            logger.warning("%s is trained without a CUDA graph: %s", self.name, reason)


class _Captured:
    """The graphs of one function for one set of shapes, and the tensors that they read and write."""

    def __init__(
        self,
        function: Callable[..., Tensors],
        inputs: Tensors,
        parameters: Sequence[Parameter],
        graphs: GradientGraphs,
        capturer: Capturer,
        learns: bool,
    ) -> None:
        self._function, self._parameters, self._graphs, self._capturer = function, parameters, graphs, capturer
        self.inputs = [one.detach().clone().requires_grad_(learns and one.requires_grad) for one in inputs]
        self.outputs: Tensors = ()
        self._learning: list[int] = []  # numbers of the outputs that have a gradient
        self._zero: set[int] = set()  # of those, whose gradient was none
        self.input_gradients: list[Tensor | None] = []

        def run_forward() -> None:
            with torch.set_grad_enabled(learns):
                self.outputs = function(*self.inputs)

        self._replay_forward = capturer.capture(run_forward)
        self._replay_forward()  # the backward pass may be run to capture it: what it reads has to be there
        self._learning = [number for number in range(len(self.outputs)) if self.outputs[number].requires_grad]
        self.output_gradients = [torch.zeros_like(self.outputs[number]) for number in self._learning]
        if self._learning:
            self._replay_backward = self._capture_backward()

    def _capture_backward(self) -> Callable[[], None]:
        wanted = [*self._parameters, *(one for one in self.inputs if one.requires_grad)]
        sums = self._graphs.gradients(self._parameters)

        def run_backward() -> None:
            found = _gradients(
                [self.outputs[number] for number in self._learning],
                wanted,
                self.output_gradients,
            )
            pairs = [(total, one) for total, one in zip(sums, found, strict=False) if one is not None]
            if pairs:
                torch._foreach_add_([total for total, _ in pairs], [one for _, one in pairs])
            of_inputs = iter(found[len(sums) :])
            self.input_gradients = [next(of_inputs) if one.requires_grad else None for one in self.inputs]

        before = [total.clone() for total in sums]  # a capture may run the function, and the sums are of a step
        try:
            return self._capturer.capture(run_backward)
        finally:
            if sums:
                torch._foreach_copy_(list(sums), before)

    def forward(self, inputs: Sequence[Tensor]) -> Tensors:
        with torch.no_grad():
            _copy_all(self.inputs, inputs)
            self._replay_forward()
        return tuple(output.detach() for output in self.outputs)

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs; those of the parameters are added to theirs."""
        self._graphs.gradients(self._parameters)
        given = [(number, gradients[number]) for number in self._learning]
        places = dict(zip(self._learning, self.output_gradients, strict=True))
        for number in {number for number, found in given if found is None} - self._zero:
            places[number].zero_()
        self._zero = {number for number, found in given if found is None}
        found = [(places[number], one) for number, one in given if one is not None]
        _copy_all([place for place, _ in found], [one for _, one in found])
        self._replay_backward()
        return [None if one is None else one.clone() for one in self.input_gradients]

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Compare a repetition with the function itself, with the same random numbers.

        Raises:
            RuntimeError: They differ.
        """
        with torch.no_grad():
            torch.manual_seed(0)
            with torch.set_grad_enabled(bool(self._learning)):
                leaves = [one.detach().requires_grad_(one.requires_grad) for one in inputs]
                expected = self._function(*leaves)
            torch.manual_seed(0)
            got = self.forward(inputs)
            differences = [_difference(one, other.detach()) for one, other in zip(got, expected, strict=True)]
            if self._learning:
                pairs = self._gradients_twice(leaves, expected)
                largest = torch.stack([other.float().abs().max() for _, other in pairs]).max()
                # A gradient that is all but zero is rounding.
                differences += [_difference(one, other, least=0.01 * largest) for one, other in pairs]
            worst = torch.stack(differences).max().item()
        if not worst <= TOLERANCE:
            raise RuntimeError(f"a graph's results differ from those without it by {worst:.3g} of the largest value")

    def _gradients_twice(self, leaves: Sequence[Tensor], expected: Tensors) -> list[tuple[Tensor, Tensor]]:
        weights = [torch.randn_like(expected[number]) / expected[number].numel() ** 0.5 for number in self._learning]
        outputs = [expected[number] for number in self._learning]
        wanted = [*self._parameters, *(one for one in leaves if one.requires_grad)]
        plain = _gradients(outputs, wanted, weights)
        sums = self._graphs.gradients(self._parameters)
        before = [total.clone() for total in sums]
        if sums:
            torch._foreach_zero_(sums)
        given: list[Tensor | None] = [None] * len(expected)
        for number, one in zip(self._learning, weights, strict=True):
            given[number] = one
        found = self.backward(given)
        of_inputs = [one for one, kept in zip(found, self.inputs, strict=True) if kept.requires_grad]
        mine = [*(total.clone() for total in sums), *of_inputs]
        if sums:
            torch._foreach_copy_(sums, before)
        pairs = zip(mine, plain, strict=True)
        return [(one, other) for one, other in pairs if one is not None and other is not None]


def _copy_all(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value to its place, all of one type at a time."""
    for dtype in dict.fromkeys(place.dtype for place in places):
        pairs = [(place, value) for place, value in zip(places, values, strict=True) if place.dtype == dtype]
        torch._foreach_copy_([place for place, _ in pairs], [value for _, value in pairs])


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], output_gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """As a step's backward pass computes them: outside of autocast. What the forward pass has kept stays."""
    with torch.autocast(outputs[0].device.type, enabled=False):
        return torch.autograd.grad(outputs, inputs, output_gradients, retain_graph=True, allow_unused=True)


def _difference(one: Tensor, other: Tensor, *, least: Tensor | float = 1e-12) -> Tensor:
    """Largest difference relative to the largest value, which counts as `least` if it is smaller."""
    one, other = one.float(), other.float()
    return (one - other).abs().max() / torch.clamp(other.abs().max(), min=least)


class _Replay(torch.autograd.Function):
    """A captured function in the graph of autograd."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, anchor: Tensor, *inputs: Tensor) -> Tensors:
        ctx.captured = captured
        ctx.set_materialize_grads(False)
        outputs = captured.forward(inputs)
        learning = set(captured._learning)
        ctx.mark_non_differentiable(*(one for number, one in enumerate(outputs) if number not in learning))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, None, *ctx.captured.backward(gradients)
