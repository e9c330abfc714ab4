"""What the CUDA graphs of the vision encoder hold of a GPU's memory in training, counted without a GPU.

    python -m jobs.bench.graph_memory

A graph keeps its memory for good: what the forward pass leaves for the backward pass, and beside it the most that the
backward pass takes at a time. Tensors have shapes and no values, as in `jobs.bench.memory`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from jobs.bench.gpu_timing import Row
from jobs.bench.memory import as_on_a_gpu
from jobs.bench.models import FULL_SIZE
from jobs.bench.our_training import OurSettings, make_runner
from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from jobs.bench.report import print_table
from jobs.bench.tensor_memory import TensorMemory
from jobs.bench.training_work import TrainingWork
from sam3lora.losses.matching import Matches

CASES = (("balanced", 1), ("full", 1), ("full", 2))
"""(preset, images in a forward)."""


@dataclass(frozen=True)
class TrunkMemory:
    """Bytes of the vision encoder of one forward and backward pass.

    Attributes:
        eager_peak: The most at a time without graphs.
        kept: What the graph of the forward pass leaves for that of the backward pass.
        held: What both graphs need together, whether or not they run.
    """

    eager_peak: int
    kept: int
    held: int


def trunk_memory(
    preset: str, images: int = 1, *, model: str = FULL_SIZE, checkpointing: tuple[str, ...] | None = None
) -> TrunkMemory:
    """Of a preset's vision encoder under bfloat16.

    Args:
        preset: Its name.
        images: In the forward.
        model: A configuration.
        checkpointing: Components that recompute their activations; None takes the preset's.
    """
    with TensorMemory(torch.device("meta")) as memory, pretend_gpu(with_values=False), as_on_a_gpu(_no_matching):
        work = TrainingWork(preset, model, precision="bf16", geometry_cls=True, device="cuda")
        meter = _Meter(memory)
        staged = make_runner(work, work.adapted_model(), OurSettings(checkpointing), capturer=meter).staged
        side = work.resolution
        pixels = torch.empty(images, 3, side, side, dtype=torch.bfloat16, device=DEVICE)

        def run() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                vision = staged.encode_images(pixels)
            torch.autograd.backward([one.float().sum() for one in vision.maps_ICHW])

        before = meter.live_bytes()
        memory.forget_peak()
        run()  # as it is
        eager_peak = memory.peak_bytes - before
        with suppress(_CountedError):
            run()
        forward, backward = meter.found
        return TrunkMemory(eager_peak, forward.kept, max(forward.peak, forward.kept + backward.peak))


def rows(cases: Sequence[tuple[str, int]] = CASES, *, model: str = FULL_SIZE) -> list[Row]:
    """With the preset's own components recomputed, and with none; in MiB."""
    found: list[Row] = []
    for preset, images in cases:
        for recomputed, checkpointing in (("as the preset", None), ("nothing", ())):
            counted = trunk_memory(preset, images, model=model, checkpointing=checkpointing)
            found.append(
                {"preset": preset, "images": images, "recomputed": recomputed}
                | {name: value / 2**20 for name, value in vars(counted).items()}
            )
    return found


def _no_matching(pending: Any) -> Matches:
    raise AssertionError("the vision encoder has nothing to match")


@dataclass(frozen=True)
class _Capture:
    kept: int
    peak: int


class _CountedError(BaseException):
    """Ends what needs not be run any more; training catches other errors of a capture."""


class _Meter:
    """Runs what is to be captured, forward and backward, and notes the bytes that were taken."""

    def __init__(self, memory: TensorMemory) -> None:
        self.found: list[_Capture] = []
        self._memory = memory

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        before = self.live_bytes()
        function()  # the warm-up, whose results the capture replaces
        warm = self.live_bytes()
        self._memory.forget_peak()
        function()
        peak = self._memory.peak_bytes - warm
        self.found.append(_Capture(self.live_bytes() - before, peak))
        if len(self.found) == 2:
            raise _CountedError
        return lambda: None

    def live_bytes(self) -> int:
        gc.collect()
        return self._memory.live_bytes


if __name__ == "__main__":
    print_table(rows(), Console(), keys=3)
