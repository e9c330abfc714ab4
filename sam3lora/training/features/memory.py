"""`FeatureMemory`: cached features in the memory of this process, in front of the disk."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

from torch import Tensor


class FeatureMemory:
    """Tensors by key up to a bound, and beyond it those that were read ahead of use. Any thread may use it.

    The first tensors that fit stay. Every epoch reads all images in turn, so a memory that evicts the least recently
    used one would never hit. ``pinned`` tensors are page-locked copies, for asynchronous transfer to a GPU.
    """

    def __init__(self, limit_bytes: int, *, pinned: bool = False) -> None:
        self.num_bytes = 0
        self._limit_bytes, self._pinned = limit_bytes, pinned
        self._kept: dict[str, Tensor] = {}
        self._ahead: dict[str, Tensor] = {}
        self._lock = threading.RLock()  # a `user` may be collected while this thread holds it

    def __len__(self) -> int:
        return len(self._kept) + len(self._ahead)

    def get(self, key: str) -> Tensor | None:
        """The tensor, or None. One that was only read ahead is returned once."""
        with self._lock:
            kept = self._kept.get(key)
            return self._ahead.pop(key, None) if kept is None else kept

    def keep(self, key: str, value: Tensor) -> bool:
        """Keep a tensor, or replace the one with its key, if there is room; returns whether there was."""
        if self._size(value) > self._limit_bytes:
            return False
        with self._lock:
            total = self.num_bytes + self._size(value) - (self._size(self._kept[key]) if key in self._kept else 0)
            if total > self._limit_bytes:
                return False
            self._kept[key] = self._pin(value)
            self.num_bytes = total
            return True

    def read_ahead(self, keys: Iterable[str], read: Callable[[str], Tensor | None], user: object) -> None:
        """Read the tensors that are not in memory before they are needed by ``user``.

        Those that are read only for it are dropped when it is collected.
        """
        held: list[str] = []
        weakref.finalize(user, self._drop_ahead, held).atexit = False
        for key in dict.fromkeys(keys):
            with self._lock:
                here = key in self._kept or key in self._ahead
            if here or (value := read(key)) is None or self.keep(key, value):
                continue
            with self._lock:
                self._ahead[key] = self._pin(value)
            held.append(key)

    def _size(self, value: Tensor) -> int:
        """Bytes of memory: torch takes page-locked memory in powers of two."""
        return 1 << (value.nbytes - 1).bit_length() if self._pinned else value.nbytes

    def _pin(self, value: Tensor) -> Tensor:
        return value.pin_memory() if self._pinned else value

    def _drop_ahead(self, keys: list[str]) -> None:
        with self._lock:
            for key in keys:
                self._ahead.pop(key, None)
