"""The table of adapter slots: which adapter each slot holds, its users, and eviction of the least recently used one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.dense.settings import DenseSettings
from serve_app.replica.adapter_folders import AdapterFolder

Recorded = PostProcessing | DenseSettings | ClickOrigin
"""What the folder of an adapter says of its use, by its task: it finds objects, labels pixels or answers clicks."""


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in a slot of the engine, and the number of requests that use it.

    A retired adapter takes no new users; its slot is emptied after the last one.
    """

    folder: AdapterFolder
    slot: int
    settings: Recorded
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class Load:
    """A load in progress.

    Attributes:
        waiters: Requests that wait for it: each becomes a user of the loaded adapter.
        waits_for_others: It waits for its turn or for a slot.
        finished: Set at the end, with either `loaded` or `error`.
    """

    folder: AdapterFolder
    waiters: int = 0
    waits_for_others: bool = False
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    loaded: LoadedAdapter | None = None
    error: Exception | None = None


class SlotTable:
    """The slots; of each id at most one adapter takes new users.

    Args:
        empty: Starts to clear the slot of a retired adapter and calls `give_back` when that is done.
        evicted: Called when an adapter is evicted for another one.
    """

    def __init__(self, num_slots: int, empty: Callable[[int], None], evicted: Callable[[], None]) -> None:
        self.num_slots = num_slots
        self._empty = empty
        self._evicted = evicted
        self._free = list(range(num_slots))
        self._usable: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._may_be_free = asyncio.Event()

    def __len__(self) -> int:
        return len(self._usable)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._usable

    def get(self, adapter_id: str) -> LoadedAdapter | None:
        """The adapter of an id that takes new users."""
        return self._usable.get(adapter_id)

    def ids(self) -> list[str]:
        """Ids of usable adapters, from the least to the most recently used."""
        return list(self._usable)

    def use(self, adapter: LoadedAdapter) -> LoadedAdapter:
        adapter.users += 1
        self._usable.move_to_end(adapter.folder.id)
        return adapter

    def release(self, adapter: LoadedAdapter) -> None:
        adapter.users -= 1
        if not adapter.users:
            if adapter.retired:
                self._empty(adapter.slot)
            else:
                self._may_be_free.set()

    def retire(self, adapter: LoadedAdapter) -> None:
        """Take no new users; empty the slot after the last one."""
        if self._usable.get(adapter.folder.id) is adapter:
            del self._usable[adapter.folder.id]
        adapter.retired = True
        if not adapter.users:
            self._empty(adapter.slot)

    async def take(self) -> int:
        """A free slot, or that of the least recently used adapter without users; waits until there is one."""
        while True:
            if self._free:
                return self._free.pop()
            for adapter in self._usable.values():
                if not adapter.users:
                    del self._usable[adapter.folder.id]
                    self._evicted()
                    return adapter.slot
            self._may_be_free.clear()
            await self._may_be_free.wait()

    def give_back(self, slot: int) -> None:
        """Return a taken slot, which is empty again."""
        self._free.append(slot)
        self._may_be_free.set()

    def add(self, adapter: LoadedAdapter) -> None:
        """Enter an adapter that was placed in a taken slot; an earlier version of it is retired."""
        if old := self._usable.get(adapter.folder.id):
            self.retire(old)
        self._usable[adapter.folder.id] = adapter
        if not adapter.users:
            self._may_be_free.set()
