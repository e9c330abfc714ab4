"""What a training step takes of a GPU's memory at full size, counted without a GPU, and what smaller cards can train.

A step runs on a pretended GPU whose tensors have shapes and no values, and the bytes of those that live are followed.
Attention allocates what a fused kernel does, and norms compute in float32, as autocast does on a GPU. The matching on
the host gets pairs that are drawn: each target's own object query in every layer; in the last one of the one-to-many
branch four, the most that there can be, or none, as with random weights, which is how a GPU was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from jobs.bench.gpu_cards import CARDS_GB, IMAGES, TAKEN_GB
from jobs.bench.gpu_timing import Row
from jobs.bench.gpu_training import Case, Inputs, Training
from jobs.bench.models import FULL_SIZE, random_model
from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from jobs.bench.report import print_table
from jobs.bench.tensor_memory import TensorMemory
from sam3lora.losses.matching import Matches, OneToManyRule, PendingMatches
from sam3lora.training.forward_sizes import GPU_SHARE, largest_that_fits, prompt_sizes

PRESETS = ("light", "balanced", "full", "maximum")
PROMPTS = 4
"""Of each image."""

RESERVED = 1.1
"""Times what tensors take: what the allocator reserves beside them, which is what `auto` goes by."""

MEASURED_GB = {("light", 1, 1): 2.8, ("balanced", 1, 2): 4.9, ("full", 1, 2): 6.0, ("maximum", 2, 2): 7.3}
"""(preset, images, prompts at a time) -> peak of the tensors in 10^9 bytes on an H100: docs/gpu.md."""


@dataclass(frozen=True)
class MemoryReport:
    """What was counted beside what a GPU measured, and what `auto` would choose on smaller cards."""

    checked: Sequence[Row]
    cards: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        return {"title": "memory", "checked": list(self.checked), "cards": list(self.cards), "torch": torch.__version__}

    def print(self, console: Console) -> None:
        if self.checked:
            console.print("\nThe peak of a step's tensors: counted, and measured on an H100\n", highlight=False)
            print_table(self.checked, console, keys=3)
        console.print("\nWhat cards can train, two images in a forward where they fit\n", highlight=False)
        print_table(self.cards, console, keys=2)


def count_memory(presets: Sequence[str] = PRESETS, *, model: str = FULL_SIZE) -> MemoryReport:
    """Both tables, for these presets; nothing was measured of another model than the full-size one."""
    return MemoryReport(check_rows(presets) if model == FULL_SIZE else [], card_rows(presets, model))


def check_rows(presets: Sequence[str] = PRESETS) -> list[Row]:
    rows = []
    for (preset, images, prompts), measured in MEASURED_GB.items():
        if preset not in presets:
            continue
        counted = peak_bytes(preset, images, prompts, many_matches=False) / 1e9
        key = {"preset": preset, "images": images, "prompts at a time": prompts}
        rows.append(key | {"counted GB": counted, "measured GB": measured, "counted / measured": counted / measured})
    return rows


def card_rows(presets: Sequence[str] = PRESETS, model: str = FULL_SIZE) -> list[Row]:
    rows = []
    for preset in presets:
        for card_gb in CARDS_GB:
            images, prompts = chosen_on(card_gb, preset, model)
            row: Row = {"preset": preset, "card GB": card_gb, "images": images or None, "prompts": prompts or None}
            rows.append(row | {"peak GB": peak_bytes(preset, images, prompts, model=model) / 1e9 if images else None})
    return rows


def chosen_on(card_gb: float, preset: str, model: str = FULL_SIZE) -> tuple[int, int]:
    """Images in a forward (two, or one where two do not fit) and prompts at a time; (0, 0) where nothing fits."""
    allowed = GPU_SHARE * (card_gb - TAKEN_GB) * 2**30
    for images in (IMAGES, 1):
        found = largest_that_fits(
            [images],
            prompt_sizes(images * PROMPTS),
            PROMPTS,
            lambda number, prompts: RESERVED * peak_bytes(preset, number, prompts, model=model),
            allowed,
        )
        if found[0]:
            return found
    return 0, 0


@cache
def peak_bytes(preset: str, images: int, max_prompts: int, *, model: str = FULL_SIZE, many_matches: bool = True) -> int:
    """The most bytes that tensors take at a time in a step with four objects a prompt.

    Two chunks of prompts are enough: all later ones take what the second does.

    Args:
        preset: Its name.
        images: In the forward.
        max_prompts: At a time.
        model: A configuration.
        many_matches: Four object queries of the one-to-many branch have a mask for each object, else none.
    """
    finish = partial(_drawn_matches, copies=OneToManyRule().topk if many_matches else 0)
    prompts = min(PROMPTS, -(-2 * max_prompts // images))
    with TensorMemory(torch.device("meta")) as memory, pretend_gpu(with_values=False), as_on_a_gpu(finish):
        sam3 = random_model(model, device=DEVICE)
        cast(Any, sam3).text_encoder = None  # it leaves the GPU
        training = Training(sam3, preset)
        inputs = Inputs.draw(sam3, Case(images, prompts), DEVICE)
        memory.forget_peak()
        training.step(inputs, max_prompts)
        moments = 2 * sum(parameter.nbytes for parameter in training.parameters)  # of AdamW, before the next step
        return memory.peak_bytes + moments


@contextmanager
def as_on_a_gpu(finish: Callable[[Any], Matches] | None = None) -> Iterator[None]:
    """Attention, norms and softmax as autocast has them on a GPU, and matches that need no values."""
    with ExitStack() as stack:
        for place, name, function in (
            (F, "scaled_dot_product_attention", _attention),
            (F, "layer_norm", _in_float32(F.layer_norm)),
            (F, "group_norm", _in_float32(F.group_norm)),
            (F, "softmax", _in_float32(F.softmax)),
        ):
            stack.enter_context(mock.patch.object(place, name, function))
        if finish is not None:
            stack.enter_context(mock.patch.object(PendingMatches, "finish", lambda pending: finish(pending)))
        yield


def _in_float32(function: Any) -> Any:
    def call(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            values = values.float()
        return function(values, *args, **kwargs)

    return call


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (one.to(torch.bfloat16) for one in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(torch.bfloat16)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel allocates: its output and a sum for each query; no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:4]
        wanted = zip(inputs, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(one) if needs and one is not None else None for one, needs in wanted)


_finish = PendingMatches.finish


def _drawn_matches(pending: Any, copies: int) -> Matches:
    """Equally many targets of each query, with `copies` object queries each at the end of the one-to-many branch."""
    (num_tables, num_targets, _), num_queries = pending._shape, pending._num_queries
    target_T = np.arange(num_targets)
    place_T = target_T % (num_targets // num_queries)
    costs = np.ones(pending._shape, dtype=np.float32)
    costs[:, target_T, place_T] = 0
    if num_tables > pending._num_layers:
        costs[-1] = 0  # of the rule that matches many: 1 where it does
        for number in range(copies):
            costs[-1, target_T, place_T * copies + number] = 1
    facts = [num_targets / num_queries] * num_queries + [1.0] * 2 * num_targets  # every mask is valid and not empty
    pending._packed = torch.from_numpy(np.concatenate([costs.flatten(), np.array(facts, dtype=np.float32)]))
    pending._arrived = None
    return _finish(pending)
