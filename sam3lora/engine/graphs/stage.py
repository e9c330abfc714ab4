"""A stage: a function of tensors whose memory stays, run for a padded number of rows and captured where it recurs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam3lora.engine.device import is_out_of_memory
from sam3lora.engine.graphs.capture import Capturer
from sam3lora.engine.transfers import write
from sam3lora.model.adapter.bank import AdapterBank

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)
"""Numbers of rows for which a stage is captured; others are padded to the next."""


def padded_size(num_rows: int) -> int:
    return next(size for size in SIZES if size >= num_rows)


class StaticTensors:
    """Tensors by name that are made once and keep their memory, each with room for `capacity` rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def like(self, name: str, example: Tensor) -> Tensor:
        """The tensor of this name, made at the first call with rows such as those of `example`."""
        kept = self._kept.get(name)
        if kept is None:
            is_nhwc = example.dim() == 4 and example[:1].permute(0, 2, 3, 1).is_contiguous()
            kept = torch.empty(
                (self.capacity, *example.shape[1:]),
                dtype=example.dtype,
                device=example.device,
                memory_format=torch.channels_last if is_nhwc else torch.contiguous_format,
            )
            # A row that was never written must not hold a NaN: it would survive a product with zero.
            self._kept[name] = kept.zero_()
        assert kept.shape[1:] == example.shape[1:], f"{name} holds rows of {kept.shape[1:]}, got {example.shape[1:]}"
        assert kept.dtype == example.dtype, f"{name} holds {kept.dtype}, got {example.dtype}"
        return kept

    def keep(self, name: str, rows: Tensor) -> None:
        """Copy rows to the front of the tensor of this name."""
        self.like(name, rows)[: len(rows)].copy_(rows)


class Stage:
    """Runs a function for 1, 2, 4, ... rows, each of which may have an adapter of its own.

    A number of rows that is asked for the first time runs as it is; at the second time it is captured. So a program
    that asks once pays for no capture. Where a capture fails, the stage goes on without.

    Args:
        function: Is given the padded number of rows. It reads and writes tensors whose memory stays, and rows do not
            influence each other.
        components: Those of the model that the function runs.
        fields: Integers of each row that the function reads in `controls`; the first is the row's slot in the bank.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[int], None],
        *,
        components: Sequence[str],
        fields: int,
        capacity: int,
        bank: AdapterBank,
        capturer: Capturer,
        device: torch.device,
    ) -> None:
        self.name = name
        self.controls_BF = torch.zeros(capacity, fields, dtype=torch.long, device=device)
        self._function = function
        self._components = tuple(components)
        self._bank = bank
        self._capturer = capturer
        self._seen: set[tuple] = set()
        self._replays: dict[tuple, Callable[[], None]] = {}
        self._may_capture = True

    def maker(self, slot: int | None) -> int | None:
        """The slot whose adapter changes what the stage computes; None if the base computes the same."""
        return slot if self._bank.components(slot).intersection(self._components) else None

    def run(self, slots_B: Sequence[int | None], controls_B: Sequence[Sequence[int]]) -> None:
        """Run for rows with these slots and other controls. The first row is repeated as often as padding asks for."""
        size = padded_size(len(slots_B))
        makers = [self.maker(slot) for slot in slots_B]
        of_base = self._bank.num_slots
        rows = [
            (of_base if maker is None else maker, *controls) for maker, controls in zip(makers, controls_B, strict=True)
        ]
        rows += rows[:1] * (size - len(rows))
        write(self.controls_BF[:size], torch.tensor(rows))
        self._run(size, None if all(maker is None for maker in makers) else self._bank.layout(self._components))

    def _run(self, size: int, layout: tuple[int, ...] | None) -> None:
        key = (size, layout)
        if layout is not None:  # captures of earlier layouts read memory that may be another's by now
            self._replays = {one: replay for one, replay in self._replays.items() if one[1] in (None, layout)}
            self._seen = {one for one in self._seen if one[1] in (None, layout)}
        if key not in self._replays and key in self._seen and self._may_capture:
            self._capture(key)
        if key in self._replays:
            self._replays[key]()
        else:
            self._compute(key)
            self._seen.add(key)

    def _compute(self, key: tuple) -> None:
        size, layout = key
        if layout is None:  # outside of a block of rows the modules compute what the base does
            self._function(size)
        else:
            with self._bank.rows_on_device(self.controls_BF[:size, 0]):
                self._function(size)

    def _capture(self, key: tuple) -> None:
        try:
            self._replays[key] = self._capturer.capture(lambda: self._compute(key))
        except Exception as error:
            self._may_capture = False
            reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            logger.warning("%s for %d rows runs without a CUDA graph: %s", self.name, key[0], reason)
