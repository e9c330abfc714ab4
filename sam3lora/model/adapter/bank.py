"""The adapter bank: several LoRA adapters on one base model, a different one for each row of a batch.

PEFT can mix adapters too (``adapter_names``), but it does not support DoRA there, nor SAM 3's windowed attention, box
pooling, ``box_head`` and ``query_proj``, and it changes the model for each adapter. Here the base model stays plain. A
forward hook on each adapted module adds to each row the update of the row's adapter; placing an adapter is a copy of
its weights.

Shapes: ``B`` rows, ``G`` groups of rows with their own weights, ``N`` positions, ``I`` inputs, ``O`` outputs,
``R`` rank, ``S`` places in a stack.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3lora.model.adapter.weights import AdapterWeights, LoraWeights
from sam3lora.model.components import component_of, unwrap

# The input of these modules is (layers, rows, queries, channels) where it has four dimensions.
_ROWS_ON_AXIS_1 = ("dot_product_scoring.query_proj", "detr_decoder.box_head.")


@dataclass(frozen=True)
class _Rows:
    """The slot of each row of the running batch; slot ``num_slots`` stands for the base.

    ``distinct`` is None where the host does not know the slots: they are in the tensor only, and may change in it.
    """

    distinct: frozenset[int] | None
    slots_B: Tensor


class _CurrentRows(threading.local):
    """The rows of the batch in this thread, for the hooks of one bank; None outside of :meth:`AdapterBank.rows`."""

    rows: _Rows | None = None

    def __reduce__(self) -> tuple:
        return _CurrentRows, ()  # of a model that is copied, which runs nothing yet


@dataclass(frozen=True)
class _PlacedAdapter:
    """The components and modules that the adapter in a slot changes."""

    components: frozenset[str]
    modules: frozenset[str]


class AdapterBank:
    """Slots for adapters on the modules of one base model.

    Call ``put`` and ``clear`` between two forward passes. ``rows`` holds for the calling thread: several may run the
    model. A module has a hook exactly while some slot has weights for it.

    torch.compile: a graph that was compiled without hooks never runs them. Use a compiled part of the model only while
    ``adapts`` is False for its component.

    CUDA graphs: one that was captured in `rows_on_device` serves every mixture of adapters, and the adapters that take
    the places of others, as long as `layout` of its components stays the same.

    The model has no PEFT layers, and is in eval mode and on its device. Empty slots take no memory.
    """

    def __init__(self, model: nn.Module, num_slots: int) -> None:
        assert num_slots > 0, f"expected at least one slot, got {num_slots}"
        self.num_slots = num_slots
        self._modules = dict(unwrap(model).named_modules())
        self._device = next(model.parameters()).device
        self._current = _CurrentRows()
        self._stacks: dict[str, _Stack] = {}
        self._placed: dict[int, _PlacedAdapter] = {}
        self._layouts: dict[str | None, int] = {}
        self._numbers = count(1)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into ``slot``, replacing the one that was there. If that fails (memory), the slot is empty.

        ``weights`` must have been read for this model.
        """
        assert 0 <= slot < self.num_slots, f"expected a slot below {self.num_slots}, got {slot}"
        before = self._placed.pop(slot, _PlacedAdapter(frozenset(), frozenset())).modules
        alike = {
            name for name in before & weights.modules.keys() if self._stacks[name].is_made_for(weights.modules[name])
        }
        self._forget(slot, before - alike)
        try:
            with torch.inference_mode(False), torch.no_grad():
                for name in alike:  # the hook and the memory stay, as another adapter takes the place at once
                    self._stacks[name].forget(slot)
                for name, update in weights.modules.items():
                    if name not in self._stacks:
                        self._stacks[name] = _Stack(name, self._modules[name], self.num_slots, self._current)
                    if self._stacks[name].add(slot, update):
                        self._change_layout(name)
        except BaseException:
            self._forget(slot, alike | weights.modules.keys())
            raise
        self._placed[slot] = _PlacedAdapter(weights.components, frozenset(weights.modules))

    def clear(self, slot: int) -> None:
        """Empty ``slot``, which may be empty already. Nothing is allocated.

        The memory of a module is freed when no other slot uses the module; until then the next ``put`` reuses it.
        """
        if (placed := self._placed.pop(slot, None)) is not None:
            self._forget(slot, placed.modules)

    def components(self, slot: int | None) -> frozenset[str]:
        """Components that the slot's adapter changes; empty for None (the base) and for an empty slot."""
        placed = self._placed.get(slot) if slot is not None else None
        return placed.components if placed else frozenset()

    def adapts(self, component: str) -> bool:
        return any(component in placed.components for placed in self._placed.values())

    def layout(self, components: Iterable[str]) -> tuple[int, ...]:
        """Numbers that change when a module of these components gets or loses its hook or moves to other memory."""
        return tuple(self._layouts.get(component, 0) for component in components)

    @property
    def size_bytes(self) -> int:
        """Memory of all stacks on the model's device."""
        return sum(stack.size_bytes for stack in self._stacks.values())

    @contextmanager
    def rows(self, slots_B: Sequence[int | None]) -> Iterator[None]:
        """Run the model with one adapter for each row; None is the base. Outside, no adapter has an effect.

        Inside, the first axis of every adapted module's input has len(slots_B) entries, or k entries for each row, one
        row after the other (windows of a ViT, pooled boxes). Calls may be nested: the innermost one has effect.
        """
        empty = {slot for slot in slots_B if slot is not None} - self._placed.keys()
        assert not empty, f"slots {sorted(empty)} are empty"
        slots = [self.num_slots if slot is None else slot for slot in slots_B]
        on_device = torch.tensor(slots, dtype=torch.long, device=self._device)
        with self._running(_Rows(frozenset(slots), on_device)):
            yield

    @contextmanager
    def rows_on_device(self, slots_B: Tensor) -> Iterator[None]:
        """As `rows`, with the slots (int64, `num_slots` for the base) in a tensor that the host does not look at.

        The same operations run whatever it holds, so that they can be captured once. An empty slot is the base.
        """
        with self._running(_Rows(None, slots_B)):
            yield

    @contextmanager
    def _running(self, rows: _Rows) -> Iterator[None]:
        before = self._current.rows
        self._current.rows = rows
        try:
            yield
        finally:
            self._current.rows = before

    def _forget(self, slot: int, modules: Iterable[str]) -> None:
        for name in modules:
            if (stack := self._stacks.get(name)) is not None and stack.forget(slot):
                stack.unhook()
                del self._stacks[name]
                self._change_layout(name)

    def _change_layout(self, module: str) -> None:
        self._layouts[component_of(module)] = next(self._numbers)


class _Stack:
    """The updates of all slots for one module, stacked, and the hook that adds them.

    A slot with an update has a place in the stacks. Place 0 is all zeros, for rows whose adapter does not change the
    module.
    """

    def __init__(self, name: str, module: nn.Module, num_slots: int, current: _CurrentRows) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d), f"{name} is a {type(module).__name__}"
        self._name, self._module, self._num_slots, self._current = name, module, num_slots, current
        self._rows_on_axis_1 = name.startswith(_ROWS_ON_AXIS_1)
        self._updates: dict[int, LoraWeights] = {}  # by slot, views into the stacks
        self._place_of: dict[int, int] = {}  # by slot
        self._rank_of: dict[int, int] = {}
        self._max_rank = 0
        self._free: list[int] = []  # places of no slot
        # `_place_of` as a tensor on the device, where the places of the rows are looked up without a synchronisation.
        self._place_of_slot = torch.zeros(num_slots + 1, dtype=torch.long, device=module.weight.device)
        self._stacks: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # down_SRI (a Conv2d's with kh, kw) and up_SOR
        self._gain_SO: Tensor | None = None
        self._handle = module.register_forward_hook(self._hook)

    def unhook(self) -> None:
        self._handle.remove()

    def add(self, slot: int, update: LoraWeights) -> bool:
        """Write one more update into a free place, or into larger stacks if there is none: then return True."""
        has_gain = update.gain is None or self._gain_SO is not None
        in_place = bool(self._free) and update.rank <= self._max_rank and has_gain
        if in_place:
            place = self._free[-1]
            self._updates[slot] = _write(list(self._stacks.values()), self._gain_SO, place, update)
            self._place_of[slot] = self._free.pop()
            self._place_of_slot[slot] = place
        else:
            self._rebuild(self._updates | {slot: update})
        self._rank_of = {slot: update.rank for slot, update in self._updates.items()}
        return not in_place

    def _rebuild(self, updates: dict[int, LoraWeights]) -> None:
        """Build the stacks anew for the largest rank.

        The number of places is a power of two, so that most later updates find a free one. Attributes are assigned
        last: if memory runs out, everything is as it was.
        """
        weight = self._module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        num_places = 1 + min(self._num_slots, 1 << (len(updates) - 1).bit_length())
        rank = max(update.rank for update in updates.values())
        down_SRI = torch.zeros(num_places, rank, *weight.shape[1:], dtype=dtype, device=weight.device)
        up_SOR = torch.zeros(num_places, weight.shape[0], rank, dtype=dtype, device=weight.device)
        gain_SO = None
        if any(update.gain is not None for update in updates.values()):
            gain_SO = torch.ones(num_places, weight.shape[0], dtype=dtype, device=weight.device)
        places = {slot: place for place, slot in enumerate(updates, start=1)}
        views = {slot: _write([(down_SRI, up_SOR)], gain_SO, places[slot], update) for slot, update in updates.items()}
        place_of_slot = [places.get(slot, 0) for slot in range(self._num_slots + 1)]
        self._place_of_slot = torch.tensor(place_of_slot, device=weight.device)
        self._updates, self._place_of, self._max_rank, self._gain_SO = views, places, rank, gain_SO
        self._stacks = {dtype: (down_SRI, up_SOR)}
        self._free = list(range(num_places - 1, len(updates), -1))

    def is_made_for(self, update: LoraWeights) -> bool:
        """Whether stacks for this update alone would be the same."""
        down_SRI, _ = next(iter(self._stacks.values()))
        return down_SRI.shape[:2] == (2, update.rank) and (update.gain is None) == (self._gain_SO is None)

    def forget(self, slot: int) -> bool:
        """Drop the slot's update and free its place. Return whether no update is left."""
        if self._updates.pop(slot, None) is not None:
            self._free.append(self._place_of.pop(slot))
            self._place_of_slot[slot] = 0
            del self._rank_of[slot]
        return not self._updates

    @property
    def size_bytes(self) -> int:
        stacks = sum(down_SRI.nbytes + up_SOR.nbytes for down_SRI, up_SOR in self._stacks.values())
        return stacks + (0 if self._gain_SO is None else self._gain_SO.nbytes)

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Forward hook: return the output with each row's update added, or None to leave it as it is."""
        rows = self._current.rows
        if rows is None or not output.numel():
            return None
        # Each row gets the weights of its place, cut to the largest rank in the batch. If all rows have the same place
        # they form one group (G = 1) and nothing is gathered; otherwise each row is a group (G = B).
        chosen: int | Tensor
        if rows.distinct is None:
            chosen, rank = self._place_of_slot[rows.slots_B], self._max_rank
        else:
            places = {self._place_of.get(slot, 0) for slot in rows.distinct}
            if not any(places):
                return None
            chosen = places.pop() if len(places) == 1 else self._place_of_slot[rows.slots_B]
            rank = max(self._rank_of.get(slot, 0) for slot in rows.distinct)
        x, by_row = args[0], output
        transposed = self._rows_on_axis_1 and x.dim() == 4
        if transposed:
            x, by_row = x.transpose(0, 1), output.transpose(0, 1)
        assert len(x) % len(rows.slots_B) == 0, (
            f"{self._name} got an input {tuple(args[0].shape)} for {len(rows.slots_B)} rows"
        )
        down_SRI, up_SOR = self._in_dtype(output.dtype)
        down_GRI, up_GOR = down_SRI[:, :rank][chosen], up_SOR[:, :, :rank][chosen]
        gain_GO = None if self._gain_SO is None else self._gain_SO[chosen]
        if isinstance(chosen, int):
            down_GRI, up_GOR, gain_GO = down_GRI[None], up_GOR[None], None if gain_GO is None else gain_GO[None]
        update = self._update_conv if isinstance(module, nn.Conv2d) else self._update_linear
        updated = update(x.to(output.dtype), by_row, down_GRI, up_GOR, gain_GO)
        return updated.transpose(0, 1) if transposed else updated

    def _in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The stacks in the dtype of the module's output, cast once; `add` then writes to all casts."""
        if dtype not in self._stacks:
            down_SRI, up_SOR = next(iter(self._stacks.values()))
            with torch.inference_mode(False), torch.no_grad():  # `add` writes to them outside of inference mode
                self._stacks[dtype] = (down_SRI.to(dtype), up_SOR.to(dtype))
        return self._stacks[dtype]

    def _update_linear(
        self, x: Tensor, output: Tensor, down_GRI: Tensor, up_GOR: Tensor, gain_GO: Tensor | None
    ) -> Tensor:
        groups = len(down_GRI)
        x_GNI, output_GNO = x.reshape(groups, -1, x.shape[-1]), output.reshape(groups, -1, output.shape[-1])
        if gain_GO is not None:
            output_GNO = self._scale(output_GNO, gain_GO[:, None], self._module.bias)
        # In place where autograd allows it: nothing else holds the module's output, and a copy takes longer than the
        # update itself.
        add = torch.baddbmm if output_GNO.requires_grad else Tensor.baddbmm_
        return add(output_GNO, x_GNI @ down_GRI.mT, up_GOR.mT).view(output.shape)

    def _update_conv(
        self, x: Tensor, output: Tensor, down_GRI: Tensor, up_GOR: Tensor, gain_GO: Tensor | None
    ) -> Tensor:
        """One grouped convolution for all rows.

        The G groups lie side by side on the channel axis, as F.conv2d expects them. The batch axis keeps the k entries
        of a group, k = len(x) / G.
        """
        groups, rank = down_GRI.shape[:2]
        x = x.reshape(groups, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        conv = cast(nn.Conv2d, self._module)
        hidden = F.conv2d(x, down_GRI.flatten(0, 1), None, conv.stride, conv.padding, groups=groups)
        hidden_GRN = hidden.view(len(x), groups, rank, -1).permute(1, 2, 0, 3).flatten(2)
        output_GOkN = output.reshape(groups, len(x), output.shape[1], -1).transpose(1, 2)
        if gain_GO is not None:
            bias = None if conv.bias is None else conv.bias[:, None, None]
            output_GOkN = self._scale(output_GOkN, gain_GO[:, :, None, None], bias)
        delta_GOkN = (up_GOR @ hidden_GRN).view(output_GOkN.shape)
        return (output_GOkN + delta_GOkN).transpose(1, 2).reshape(output.shape)

    @staticmethod
    def _scale(output: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """DoRA scales the product with the base's weight, and not the bias."""
        without_bias = output if bias is None else output - bias
        return (output + (gain - 1) * without_bias).to(output.dtype)


def _write(
    stacks: Sequence[tuple[Tensor, Tensor]], gain_SO: Tensor | None, place: int, update: LoraWeights
) -> LoraWeights:
    """Write an update into a place of the stacks of every dtype; return it as views into the first stacks."""
    for down_SRI, up_SOR in stacks:
        down_SRI[place, update.rank :] = 0
        up_SOR[place, :, update.rank :] = 0
        down_SRI[place, : update.rank].copy_(update.down)
        up_SOR[place, :, : update.rank].copy_(update.up)
    gain = None
    if gain_SO is not None:
        gain_SO[place] = 1 if update.gain is None else update.gain
        gain = None if update.gain is None else gain_SO[place]
    down_SRI, up_SOR = stacks[0]
    return LoraWeights(down_SRI[place, : update.rank], up_SOR[place, :, : update.rank], gain)
