"""Training on a GPU whose memory is limited to that of smaller cards, as `auto` trains there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_timing import Row, forget_peak
from jobs.bench.gpu_training import Case, Inputs, Training
from jobs.bench.gpu_training_rows import PROMPTS, adapted, measured_steps, prompts_that_fit

CARDS_GB = (8, 12, 16, 24)
TAKEN_GB = 0.6
"""Of a card's memory, by CUDA itself."""

IMAGES = 2
"""In a forward, as the presets have it."""


def card_cases(model_name: str, device: torch.device, *, presets: Sequence[str], repeats: int) -> Iterator[GpuCase]:
    """A row for each preset and card: prompts at a time that `auto` chooses, peak memory and speed."""
    for preset in presets:
        training = cache(partial(adapted, Training, preset, model_name, device))
        for card_gb in CARDS_GB:
            key = {"preset": preset, "card GB": card_gb}
            if device.type == "cuda":
                yield GpuCase(key, partial(_on_card, training, card_gb, device, repeats))
            else:
                yield GpuCase(key, lambda: {"note": "needs a GPU"})
        training.cache_clear()


def _on_card(training_of: Callable[[], Training], card_gb: int, device: torch.device, repeats: int) -> Row:
    training = training_of()
    training.forget_gradients()
    forget_peak(device)
    with _memory_of(card_gb, device):
        images = IMAGES
        while images:
            case = Case(images, PROMPTS)
            inputs = Inputs.draw(training.staged.model, case, device)
            if number := prompts_that_fit(training, inputs):
                row = measured_steps(partial(training.step, inputs, number), case, device, repeats)
                kept = {name: row[name] for name in ("images/s", "peak GB", "step ms")}
                return {"images": images, "prompts at a time": number} | kept
            images //= 2
    return {"note": "not even one prompt of one image fits"}


@contextmanager
def _memory_of(card_gb: int, device: torch.device) -> Iterator[None]:
    """Inside, this process may take what a card of so many GB (2^30 bytes) would leave to it."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, (card_gb - TAKEN_GB) * 2**30 / total)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
