"""Bottlenecks of several adapters before the layers of one trunk, others for each image of a batch.

Shapes: `I` images, `H` `W` patches, `C` channels of the trunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class BottleneckBank:
    """Holds the bottlenecks of slots; the trunk has hooks only while images of such a slot pass it.

    Args:
        trunk: A `Sam3ViTModel`, which stays as it is.
    """

    def __init__(self, trunk: Any) -> None:
        self._layers = trunk.layers
        self._slots: dict[int, nn.ModuleList] = {}

    @property
    def size_bytes(self) -> int:
        return sum(weight.nbytes for one in self._slots.values() for weight in one.parameters())

    def put(self, slot: int, bottlenecks: nn.ModuleList) -> None:
        """Take the bottlenecks of an adapter, one `Bottleneck` for each layer, on the device of the trunk."""
        self._slots[slot] = bottlenecks

    def clear(self, slot: int) -> None:
        self._slots.pop(slot, None)

    @contextmanager
    def rows(self, slots_I: Sequence[int | None]) -> Iterator[None]:
        """Within it, the layers adapt images of slots with bottlenecks and leave all others alone."""
        chosen: dict[int, list[int]] = {}
        for row, slot in enumerate(slots_I):
            if slot in self._slots:
                chosen.setdefault(slot, []).append(row)
        with ExitStack() as hooks:
            for number, layer in enumerate(self._layers) if chosen else ():
                hook = layer.register_forward_pre_hook(functools.partial(self._adapt, number, chosen))
                hooks.callback(hook.remove)
            yield

    def _adapt(self, number: int, chosen: dict[int, list[int]], _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of a layer."""
        tokens_IHWC: Tensor = inputs[0]
        adapted_IHWC = tokens_IHWC.clone()
        for slot, rows in chosen.items():
            adapted_IHWC[rows] = self._slots[slot][number](tokens_IHWC[rows])
        return (adapted_IHWC, *inputs[1:])
