"""Who is in which slot, who uses it, and who has to make room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.replica.adapter_folders import AdapterFolder


@dataclass(eq=False)
class Resident:
    """An adapter in a slot. `retired`: nobody new may use it, and its slot is emptied after the last user."""

    folder: AdapterFolder
    slot: int
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class Load:
    """A load in progress, and how many requests wait for it: each of them becomes a user of the resident.

    `waits_for_others`: for its turn, or for a slot.
    """

    folder: AdapterFolder
    waiters: int = 0
    waits_for_others: bool = False
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    resident: Resident | None = None
    error: Exception | None = None


class SlotTable:
    """At most one resident that may be used of each id; the least recently used one goes first.

    Args:
        num_slots: How many there are.
        empty: Starts to clear the slot of a retired resident and calls `give_back` when that is done.
        evicted: Called when a resident makes room for another.
    """

    def __init__(self, num_slots: int, empty: Callable[[int], None], evicted: Callable[[], None]) -> None:
        self.num_slots = num_slots
        self._empty = empty
        self._evicted = evicted
        self._free = list(range(num_slots))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._may_be_free = asyncio.Event()

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._residents

    def get(self, adapter_id: str) -> Resident | None:
        """The resident of an id that may be used."""
        return self._residents.get(adapter_id)

    def ids(self) -> list[str]:
        """From the least to the most recently used."""
        return list(self._residents)

    def use(self, resident: Resident) -> Resident:
        """One more user."""
        resident.users += 1
        self._residents.move_to_end(resident.folder.id)
        return resident

    def release(self, resident: Resident) -> None:
        """One user less."""
        resident.users -= 1
        if not resident.users:
            if resident.retired:
                self._empty(resident.slot)
            else:
                self._may_be_free.set()

    def retire(self, resident: Resident) -> None:
        """Nobody new; those who use it finish."""
        if self._residents.get(resident.folder.id) is resident:
            del self._residents[resident.folder.id]
        resident.retired = True
        if not resident.users:
            self._empty(resident.slot)

    async def take(self) -> int:
        """A free slot, or that of the least recently used resident without users; waits until there is one."""
        while True:
            if self._free:
                return self._free.pop()
            for resident in self._residents.values():
                if not resident.users:
                    del self._residents[resident.folder.id]
                    self._evicted()
                    return resident.slot
            self._may_be_free.clear()
            await self._may_be_free.wait()

    def give_back(self, slot: int) -> None:
        """A taken slot in which nothing is."""
        self._free.append(slot)
        self._may_be_free.set()

    def settle(self, folder: AdapterFolder, slot: int, users: int) -> Resident:
        """An adapter that was placed in a taken slot; an earlier version of it is retired."""
        if old := self._residents.get(folder.id):
            self.retire(old)
        resident = self._residents[folder.id] = Resident(folder, slot, users)
        if not users:
            self._may_be_free.set()
        return resident
